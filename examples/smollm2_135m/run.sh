#!/usr/bin/env bash
# One experiment on SmolLM2-135M: edit, stage 1, stage 2, export, evaluate. GPUs, or a CPU.
#
#   bash examples/smollm2_135m/run.sh [options] mla|gate_swa
#
#   --work DIR        what prepare.sh made (default: outputs/smollm2_135m)
#   --name NAME       the student's folder inside it (default: the attention's name)
#   --edit FLAGS      more flags for tools/edit_checkpoint.py, such as "--init random --seed 2"
#   --stage1 FLAGS    more flags for stage 1, such as "--lr 2e-3 --train-iters 500"
#   --between FLAGS   between the stages, stage 1 again on the student's own hidden states, with
#                     flags such as "--train-iters 300 --scheduled-sampling-end 1"
#   --stage2 FLAGS    the same for stage 2, such as "--lr 1e-4 --seed 2 --trainable all"
#   --no-stage1       stage 2 alone, from the edited student
#   --no-stage2       stage 1 alone; with --no-stage1, the edited student as it is
#   --edit-of NAME    no edit: that of another student
#   --stage1-of NAME  no edit and no stage 1: those of another student
#   --longer NAME     the same, and stage 2 continues where NAME's had its oldest checkpoint, optimizer
#                     and all: before the decay of the learning rate; give --stage2 "--train-iters N"
#   --from DIR        no edit and no stage 1: stage 2 starts from the student in DIR
#   --processes N     GPUs that train together, each on its share of the samples (default: 1)
#   --evaluate FLAGS  more flags for tools/evaluate.py, such as "--max-windows 50"
#   --no-evaluate     no export and no report: for a search of learning rates
#
# Flags override the recipes beside this script. The report is in WORK/NAME/report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m
name='' attention='' from='' edit_of='' stage1_of='' longer='' edit=() stage1=() between=() stage2=() evaluate=() report=yes stages=' 1 2' processes=1
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --name) name=${2:?--name needs a name}; shift 2 ;;
        --edit) read -ra edit <<<"$2"; shift 2 ;;
        --stage1) read -ra stage1 <<<"$2"; shift 2 ;;
        --between) read -ra between <<<"$2"; shift 2 ;;
        --stage2) read -ra stage2 <<<"$2"; shift 2 ;;
        --evaluate) read -ra evaluate <<<"$2"; shift 2 ;;
        --edit-of) edit_of=${2:?--edit-of needs a name}; shift 2 ;;
        --stage1-of) stage1_of=${2:?--stage1-of needs a name}; stages=' 2'; shift 2 ;;
        --longer) longer=${2:?--longer needs a name}; stages=' 2'; shift 2 ;;
        --from) from=${2:?--from needs a directory}; stages=' 2'; shift 2 ;;
        --processes) processes=${2:?--processes needs a number}; shift 2 ;;
        --no-evaluate) report=''; shift ;;
        --no-stage1) stages=${stages/ 1/}; shift ;;
        --no-stage2) stages=${stages/ 2/}; shift ;;
        -h | --help) sed -n '2,25s/^# \{0,1\}//p' "$0"; exit 0 ;;
        mla | gate_swa) attention=$1; shift ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ -z "$attention" ]; then
    echo "error: name an attention, mla or gate_swa; see --help" >&2
    exit 2
fi
if [ ${#between[@]} -gt 0 ] && [ -n "$longer$from" ]; then
    echo "error: --between: comes before a stage 2 that restarts; not with --longer or --from" >&2
    exit 2
fi
if [ ! -f "$work/data/train.json" ]; then
    echo "error: --work $work: no data there; run prepare.sh first" >&2
    exit 2
fi
here=examples/smollm2_135m
run=$work/${name:-$attention}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }

# 102 + 32 elements per token and layer instead of the teacher's 384: 34.9 %.
shape=(--kv-lora-rank 102 --qk-pos-emb-head-dim 32)
if [ "$attention" = gate_swa ]; then shape=(--sliding-window 128); fi

borrow() { # STAGE NAME: another student's, as if it were this one's
    if [ "$work/$2" = "$run" ]; then return; fi
    if [ ! -d "$work/$2/$1" ]; then
        echo "error: $work/$2/$1: no such folder" >&2
        exit 2
    fi
    mkdir -p "$run"
    ln -sfn "$(cd "$work/$2/$1" && pwd)" "$run/$1"
}

student=name=${name:-$attention}
stage1_of=${stage1_of:-$longer}
edit_of=${edit_of:-$stage1_of}
load=${from:-$run/edit}
if [ -n "$edit_of" ]; then
    borrow edit "$edit_of"
elif [ -z "$from" ]; then
    say "$run: edit"
    python tools/edit_checkpoint.py --teacher "$work/teacher" --save "$run/edit" \
        --student-attention "$attention" "${shape[@]}" --seq-length 2048 \
        --calibration-data-path "$work/data/train" --calibration-tokens 65536 "${edit[@]}"
fi
if [ -z "$from" ]; then student+=,after_edit=$load; fi
if [ -n "$stage1_of" ] && [ -d "$work/$stage1_of/stage1" ]; then
    borrow stage1 "$stage1_of"
    load=$run/stage1
    student+=,after_stage1=$load
fi
if [ -n "$longer" ] && [ ! -d "$run/stage2" ]; then
    oldest=$(cd "$work/$longer/stage2" && printf '%s\n' iter_* | head -n 1)
    mkdir -p "$run/stage2"
    cp -r "$work/$longer/stage2/$oldest" "$work/$longer/stage2/metrics.jsonl" "$run/stage2/"
    echo $((10#${oldest#iter_})) >"$run/stage2/latest_checkpointed_iteration.txt"
fi
# train STAGE FOLDER FLAGS...
train() {
    say "$run: stage $1"
    torchrun --standalone --nproc-per-node "$processes" "tools/pretrain_stage$1.py" \
        --recipe "$here/${attention}_stage$1.yaml" --teacher "$work/teacher" --load "$load" \
        --save "$run/$2" --train-data-path "$work/data/train" \
        --valid-data-path "$work/data/validation" "${@:3}"
    load=$run/$2
}
if [[ $stages = *1* ]]; then
    train 1 stage1 "${stage1[@]}"
    student+=,after_stage1=$load
fi
if [ ${#between[@]} -gt 0 ]; then
    train 1 between "${between[@]}"
    student+=,after_between=$load
fi
if [[ $stages = *2* ]]; then
    train 2 stage2 "${stage2[@]}"
    student+=,after_stage2=$load
fi
if [ -z "$report" ]; then exit 0; fi
say "$run: export"
python tools/convert_checkpoint.py export --input "$load" --output "$run/hf" --overwrite
say "$run: evaluate on the held-out source"
python tools/evaluate.py --teacher "$work/teacher" --student "$student" \
    --text "$work/corpus/heldout.jsonl" --seq-length 2048 --max-windows 100 --batch-size 8 \
    --output "$run/report" "${evaluate[@]}"
