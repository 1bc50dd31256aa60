#!/usr/bin/env bash
# Frozen layers in FP8 against bfloat16: both attentions, the same tokens and seeds, one report.
# bf16: both stages in bfloat16. fp8_0, fp8_50, fp8_85: stage 1 in FP8, then that share of stage 2.
#
#   bash examples/smollm2_135m/fp8.sh [options]
#
#   --work DIR         what prepare.sh made (default: outputs/smollm2_135m)
#   --iterations N     of a student, over both stages (default: 360, 11.8 M tokens, 2 minutes of a GPU)
#   --seeds "N N"      of data order and edit (default: "1 2")
#   --shares "N N"     of stage 2 in FP8, percent (default: "0 50 85")
#   --precision NAME   fp8, or fp8-emulated where there are no FP8 products (default: fp8)
#   --jobs N           runs at a time; GPUs take turns (default: 1)
#   --stage FLAGS      more flags of every stage
#   --evaluate FLAGS   more flags of the evaluation
#   --no-report        train only
#   --report           only measure
#
# The report is in WORK/report_fp8. What is finished is not trained again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m iterations=360 seeds='1 2' shares='0 50 85' precision=fp8 jobs=1
stage='' evaluate='' trains=yes measures=yes
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --iterations) iterations=${2:?--iterations needs a number}; shift 2 ;;
        --seeds) seeds=${2:?--seeds needs numbers}; shift 2 ;;
        --shares) shares=${2:?--shares needs numbers}; shift 2 ;;
        --precision) precision=${2:?--precision needs a name}; shift 2 ;;
        --jobs) jobs=${2:?--jobs needs a number}; shift 2 ;;
        --stage) stage=$2; shift 2 ;;
        --evaluate) evaluate=$2; shift 2 ;;
        --no-report) measures=''; shift ;;
        --report) trains=''; shift ;;
        -h | --help) sed -n '2,20s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
first=$((iterations * 3 / 10))
same='--global-batch-size 16 --micro-batch-size 16 --trainable attention'
same+=" --lr-decay-style cosine --lr-wsd-decay-iters 0 --train-iters $((iterations - first))"
gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')

commands=() students=()
run() { # NAME DONE FLAGS...: one run of run.sh, where its last output is not there yet
    local name=$1 last=$2
    shift 2
    if [ -e "$work/$name/$last" ]; then return; fi
    local device=$((${#commands[@]} % gpus))
    commands+=("CUDA_VISIBLE_DEVICES=\${CUDA_VISIBLE_DEVICES:-$device} bash examples/smollm2_135m/run.sh --work ${work@Q} --name $name --no-evaluate ${*@Q} > ${work@Q}/$name.log 2>&1 || { echo error: $name; tail -n 5 ${work@Q}/$name.log; exit 1; }")
}
together() { # the commands so far, --jobs at a time
    if [ -n "$trains" ] && [ ${#commands[@]} -gt 0 ]; then
        printf '%s\0' "${commands[@]}" | xargs -0 -P "$jobs" -I{} bash -c '{}'
    fi
    commands=()
}
each() { # FUNCTION: for every attention and seed
    for attention in mla gate_swa; do
        for seed in $seeds; do $1 $attention "$seed"; done
    done
    together
}
tracker=latest_checkpointed_iteration.txt
in_fp8="--frozen-precision $precision"
edit() {
    local flags="--seed $2"
    if [ "$1" = gate_swa ]; then flags+=' --full-layers auto'; fi
    run "$1_$2" edit --no-stage1 --no-stage2 --edit "$flags" "$1"
}
stage1() {
    local flags="--seed $2 --train-iters $first $stage"
    run "$1_$2_bf16" stage1/$tracker --edit-of "$1_$2" --no-stage2 --stage1 "$flags" "$1"
    run "$1_$2_fp8" stage1/$tracker --edit-of "$1_$2" --no-stage2 --stage1 "$flags $in_fp8" "$1"
}
stage2() {
    local flags="--seed $2 --lr 6e-4 --eval-interval 50 $same $stage"
    run "$1_$2_bf16" stage2/$tracker --stage1-of "$1_$2_bf16" --stage2 "$flags" "$1"
    students+=(--student "name=$1_$2_bf16,after_stage2=$work/$1_$2_bf16/stage2")
    for share in $shares; do
        local name=$1_$2_fp8_$share more=''
        if [ "$share" != 0 ]; then
            # What would be refused is measured here, too.
            more="$in_fp8 --frozen-precision-until 0.$share --frozen-precision-kl-share 1000"
        fi
        run "$name" stage2/$tracker --stage1-of "$1_$2_fp8" --stage2 "$flags $more" "$1"
        students+=(--student "name=$name,after_stage2=$work/$name/stage2")
    done
}
each edit
each stage1
each stage2
if [ -z "$measures" ]; then exit 0; fi
read -ra more <<<"$evaluate"
python tools/evaluate.py --teacher "$work/teacher" "${students[@]}" \
    --text "$work/corpus/heldout.jsonl" --seq-length 2048 --max-windows 40 --batch-size 8 \
    --generations 0 --prompts 0 --output "$work/report_fp8" "${more[@]}"
