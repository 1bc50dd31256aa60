#!/usr/bin/env bash
# Plain text alone against a blend of 30 % text and 70 % of the teacher's own answers: both attentions,
# the same tokens and seeds. Both begin from the same stage 1, on text; answers.sh comes before.
#
#   bash examples/smollm2_135m/blend.sh [options]
#
#   --work DIR        what prepare.sh and answers.sh made (default: outputs/smollm2_135m)
#   --iterations N    of a student, over both stages (default: 400, 13.1 M tokens, 2 minutes of a GPU)
#   --seeds "N N"     of data order and edit (default: "1 2")
#   --edit FLAGS      more flags of every edit
#   --stage FLAGS     more flags of every stage
#   --evaluate FLAGS  more flags of every evaluation
#   --answers FLAGS   let answers.sh make the answers, with these flags, such as "--prompts 4000"
#   --list            only print the steps that are not done yet: name, kind, names that come before it,
#                     command; steps.py runs them side by side
#
# One GPU. Reports are in WORK/report_blend/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m iterations=400 seeds='1 2' edit='' stage='' evaluate='' answers='' list=''
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --iterations) iterations=${2:?--iterations needs a number}; shift 2 ;;
        --seeds) seeds=${2:?--seeds needs numbers}; shift 2 ;;
        --edit) edit=$2; shift 2 ;;
        --stage) stage=$2; shift 2 ;;
        --evaluate) evaluate=$2; shift 2 ;;
        --answers) answers=${2:?--answers needs flags of answers.sh}; shift 2 ;;
        --list) list=yes; shift ;;
        -h | --help) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ -z "$list$answers" ] && [ ! -f "$work/data/answers.json" ]; then
    echo "error: --work $work: no data/answers there; run answers.sh first" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
here=examples/smollm2_135m

step() { # NAME KIND NEEDS COMMAND...
    if [ -n "$list" ]; then
        printf '%s\t%s\t%s\t' "$1" "$2" "$3"
        shift 3
        printf '%q ' "$@"
        echo
    else
        "${@:4}"
    fi
}
is_done() { # STUDENT STAGE ITERATION: trained to the end
    [ "$(cat "$work/$1/$2/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$3" ]
}
student() { # NAME NEEDS FLAGS... ATTENTION
    step "$1" train "$2" bash $here/run.sh --work "$work" --name "$1" --no-evaluate "${@:3}"
}

first=$((iterations * 3 / 10))
rest=$((iterations - first))
same='--global-batch-size 16 --micro-batch-size 16 --lr-decay-style cosine --lr-wsd-decay-iters 0'
declare -A full=([mla]='' [gate_swa]='--full-layers auto')
declare -A data=(
    [plain]="$work/data/train"
    [blend]="0.3 $work/data/train 0.7 $work/data/answers"
)
declare -A needs=([plain]=answers_validation [blend]='answers_validation,answers')
if [ -n "$answers" ]; then
    read -ra more <<<"$answers"
    for part in answers_validation answers; do
        if [ ! -f "$work/data/$part.json" ]; then
            step $part data - bash $here/answers.sh --work "$work" --part $part "${more[@]}"
        fi
    done
fi
for seed in $seeds; do
    for attention in mla gate_swa; do
        name=${attention}_$seed
        if ! is_done "$name" stage1 $first; then
            student "$name" - --no-stage2 --edit "--seed $seed ${full[$attention]} $edit" \
                --stage1 "--seed $seed --train-iters $first $stage" "$attention"
        fi
    done
done
for kind in plain blend; do
    for seed in $seeds; do
        for attention in mla gate_swa; do
            name=${attention}_${kind}_$seed
            paths="--train-data-path ${data[$kind]} --valid-data-path $work/data/answers_validation"
            if ! is_done "$name" stage2 $rest; then
                student "$name" "${attention}_$seed,${needs[$kind]}" --stage1-of "${attention}_$seed" \
                    --stage2 "--seed $seed --train-iters $rest $same $paths $stage" "$attention"
            fi
        done
    done
done
read -ra more <<<"$evaluate"
for seed in $seeds; do
    for attention in mla gate_swa; do
        students=() before=''
        for kind in plain blend; do
            name=${attention}_${kind}_$seed
            before+=,$name
            students+=(--student "name=$name,after_stage2=$work/$name/stage2")
        done
        report=$work/report_blend/${attention}_$seed
        if [ ! -f "$report/report.json" ]; then
            step "report_${attention}_$seed" report "${before#,}" python tools/evaluate.py \
                --teacher "$work/teacher" "${students[@]}" --text "$work/corpus/heldout.jsonl" \
                --seq-length 2048 --max-windows 40 --batch-size 8 --generated-tasks all \
                --task-lengths 1024,2048 --output "$report" "${more[@]}"
        fi
    done
done
