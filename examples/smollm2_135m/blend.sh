#!/usr/bin/env bash
# Plain text alone against a blend of 30 % text and 70 % of the teacher's own answers: both attentions,
# the same tokens and seeds, one report. answers.sh comes before.
#
#   bash examples/smollm2_135m/blend.sh [options]
#
#   --work DIR        what prepare.sh and answers.sh made (default: outputs/smollm2_135m)
#   --iterations N    of a student, over both stages (default: 400, 13.1 M tokens, 2 minutes of a GPU)
#   --seeds "N N"     of data order and edit (default: "1 2")
#   --stage FLAGS     more flags of every stage
#   --evaluate FLAGS  more flags of the evaluation
#   --list            only print the commands
#
# One GPU. The report is in WORK/report_blend.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m iterations=400 seeds='1 2' stage='' evaluate='' list=''
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --iterations) iterations=${2:?--iterations needs a number}; shift 2 ;;
        --seeds) seeds=${2:?--seeds needs numbers}; shift 2 ;;
        --stage) stage=$2; shift 2 ;;
        --evaluate) evaluate=$2; shift 2 ;;
        --list) list=yes; shift ;;
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ -z "$list" ] && [ ! -f "$work/data/answers.json" ]; then
    echo "error: --work $work: no data/answers there; run answers.sh first" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
run() { if [ -n "$list" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

first=$((iterations * 3 / 10))
same='--global-batch-size 16 --micro-batch-size 16 --trainable attention'
same+=' --lr-decay-style cosine --lr-wsd-decay-iters 0'
declare -A data=(
    [plain]="$work/data/train"
    [blend]="0.3 $work/data/train 0.7 $work/data/answers"
)
students=()
for seed in $seeds; do
    for attention in mla gate_swa; do
        for kind in plain blend; do
            name=${attention}_${kind}_$seed
            paths="--train-data-path ${data[$kind]} --valid-data-path $work/data/answers_validation"
            if [ -n "$list" ] || [ ! -e "$work/$name/stage2/latest_checkpointed_iteration.txt" ]; then
                run bash examples/smollm2_135m/run.sh --work "$work" --name "$name" --no-evaluate \
                    --edit "--seed $seed" \
                    --stage1 "--seed $seed --train-iters $first $paths $stage" \
                    --stage2 "--seed $seed --train-iters $((iterations - first)) $same $paths $stage" \
                    "$attention"
            fi
            students+=(--student "name=$name,after_stage2=$work/$name/stage2")
        done
    done
done
read -ra more <<<"$evaluate"
run python tools/evaluate.py --teacher "$work/teacher" "${students[@]}" \
    --text "$work/corpus/heldout.jsonl" --seq-length 2048 --max-windows 40 --batch-size 8 \
    --generated-tasks all --task-lengths 1024,2048 --output "$work/report_blend" "${more[@]}"
