#!/usr/bin/env bash
# Comparison arms on SmolLM2-135M, all with the same tokens: both attentions, started from the teacher
# and at random, through both stages and through stage 2 alone, each at three learning rates; besides,
# full layers by measurement, sink tokens or logits beside, a gate per head or none, everything trained in stage 2, layers on the
# student's own hidden states between the stages, MLA with other numbers in its cache and with a chosen
# rotary part, and its other fits without training.
#
#   bash examples/smollm2_135m/arms.sh [options]
#
#   --work DIR         what prepare.sh made (default: outputs/smollm2_135m)
#   --iterations N     of an arm, over both stages (default: 400, 13.1 M tokens, 2 minutes of a GPU)
#   --edit FLAGS       more flags of every edit
#   --gate_swa FLAGS   more flags of GateSWA's edits
#   --stage FLAGS      more flags of every stage
#   --evaluate FLAGS   more flags of every evaluation
#   --list             only print the steps: name, kind, names that come before it, command
#   --report PREFIX    only measure the arms of --iterations N that are finished and whose names begin
#                      so; edits: MLA's fits
#
# One GPU; about an hour and three quarters. Reports are in WORK/report_*/; `-m tools.benchmark.results add` keeps them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m iterations=400 edit='' gate_swa='' stage='' evaluate='' list='' report=''
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --iterations) iterations=${2:?--iterations needs a number}; shift 2 ;;
        --edit) edit=$2; shift 2 ;;
        --gate_swa) gate_swa=$2; shift 2 ;;
        --stage) stage=$2; shift 2 ;;
        --evaluate) evaluate=$2; shift 2 ;;
        --report) report=${2:?--report needs a prefix}; shift 2 ;;
        --list) list=yes; shift ;;
        -h | --help) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
this=examples/smollm2_135m
stage1_iterations=$((iterations * 3 / 10))
stage2_iterations=$((iterations - stage1_iterations))
half=$((stage1_iterations / 2))
# What the recipes of longer runs have otherwise.
same='--global-batch-size 16 --micro-batch-size 16 --trainable attention'
same+=' --lr-decay-style cosine --lr-wsd-decay-iters 0'

# To the end: a run that was stopped has a checkpoint, too.
is_trained() {
    case ${1##*/} in *_alone_*) last=$iterations ;; *) last=$stage2_iterations ;; esac
    [ "$(cat "$1/stage2/latest_checkpointed_iteration.txt" 2>/dev/null)" = "$last" ]
}
if [ -n "$report" ]; then
    arms=("$work/$report"*)
    if [ "$report" = edits ]; then arms=("$work"/mla_{teacher,random,svd,pca,covariance}_edit); fi
    students=()
    for arm in "${arms[@]}"; do
        states=name=${arm##*/}
        if [ "$report" = edits ]; then
            states+=,after_edit=$arm/edit
        elif is_trained "$arm"; then
            for stage in stage1 between; do
                if [ -d "$arm/$stage" ]; then states+=,after_$stage=$arm/$stage; fi
            done
            states+=,after_stage2=$arm/stage2
        else
            continue
        fi
        students+=(--student "$states")
    done
    read -ra more <<<"$evaluate"
    exec python tools/evaluate.py --teacher "$work/teacher" "${students[@]}" \
        --text "$work/corpus/heldout.jsonl" --seq-length 2048 --max-windows 40 --batch-size 8 \
        --generations 0 --prompts 0 --output "$work/report_$report" "${more[@]}"
fi

step() { # NAME KIND NEEDS COMMAND...
    local name=$1 kind=$2 needs=$3
    shift 3
    if [ -n "$list" ]; then
        printf '%s\t%s\t%s\t%s\n' "$name" "$kind" "$needs" "${*@Q}"
    else
        "$@"
    fi
}
arm() { # NAME KIND NEEDS ATTENTION FLAGS...
    local name=$1 kind=$2 needs=$3 attention=$4
    shift 4
    step "$name" "$kind" "$needs" bash $this/run.sh --work "$work" --name "$name" \
        --no-evaluate "$@" "$attention"
}
start() { # NAME ATTENTION FLAGS: an edit without training
    local flags="$3 $edit"
    if [ "$2" = gate_swa ]; then flags+=" $gate_swa"; fi
    arm "$1_edit" edit - "$2" --no-stage1 --no-stage2 --edit "$flags"
}
first() { # NAME ATTENTION LR: stage 1
    arm "$1_stage1" train "$1_edit" "$2" --edit-of "$1_edit" --no-stage2 \
        --stage1 "--train-iters $stage1_iterations --lr $3 $stage"
}
both() { # NAME ATTENTION LR SUFFIX FLAGS: stage 2 after stage 1
    arm "$1_both$4_$3" train "$1_stage1" "$2" --stage1-of "$1_stage1" \
        --stage2 "$same --train-iters $stage2_iterations --lr $3 --eval-interval 20 $5 $stage"
}
alone() { # NAME ATTENTION LR: stage 2 for all the tokens
    arm "$1_alone_$3" train "$1_edit" "$2" --edit-of "$1_edit" --no-stage1 \
        --stage2 "$same --train-iters $iterations --lr $3 --eval-interval 20 $stage"
}
own() { # NAME ATTENTION LR: the second half of stage 1 on more and more of the student's hidden states
    arm "$1_own_$3" train "$1_edit" "$2" --edit-of "$1_edit" \
        --stage1 "--train-iters $((stage1_iterations - half)) --lr 1e-3 $stage" \
        --between "--train-iters $half --lr 1e-3 --scheduled-sampling-end 1 $stage" \
        --stage2 "$same --train-iters $stage2_iterations --lr $3 --eval-interval 20 $stage"
}
rates() { # START: its three learning rates of stage 2, the likeliest first
    case $1 in *random) echo 1.2e-3 2.4e-3 6e-4 ;; *) echo 6e-4 1.2e-3 3e-4 ;; esac
}

starts=(mla_random gate_swa_random gate_swa_teacher mla_teacher)
shaped=(gate_swa_auto gate_swa_sinks gate_swa_logits gate_swa_headwise gate_swa_ungated)
start mla_random mla "--init random"
start gate_swa_random gate_swa "--init random --sink none"
start mla_teacher mla ""
start gate_swa_teacher gate_swa "--sink none"
start gate_swa_auto gate_swa "--full-layers auto --sink none"
start gate_swa_sinks gate_swa "--full-layers auto --sink-tokens 4"
start gate_swa_logits gate_swa "--full-layers auto --sink logit --output-gate elementwise"
start gate_swa_headwise gate_swa "--full-layers auto --sink logit --output-gate headwise"
start gate_swa_ungated gate_swa "--full-layers auto --sink logit --output-gate none"
for fit in svd pca covariance; do start mla_$fit mla "--mla-fit $fit"; done
for name in "${starts[@]}" "${shaped[@]}"; do
    case $name in *random) rate=2e-3 ;; *) rate=1e-3 ;; esac
    first "$name" "${name%_*}" "$rate"
done
for n in 1 2 3; do
    for name in "${starts[@]}"; do
        rate=$(rates "$name" | cut -d ' ' -f $n)
        both "$name" "${name%_*}" "$rate" '' ''
        alone "$name" "${name%_*}" "$rate"
    done
    for name in "${shaped[@]}"; do
        both "$name" gate_swa "$(rates "$name" | cut -d ' ' -f $n)" '' ''
    done
    for name in mla_teacher gate_swa_teacher; do
        both "$name" "${name%_*}" "$(echo 6e-4 3e-4 1.2e-3 | cut -d ' ' -f $n)" _all '--trainable all'
        own "$name" "${name%_*}" "$(rates "$name" | cut -d ' ' -f $n)"
    done
done
# Latent and rotary elements per token and layer: the same cache cut in other ways, then larger ones.
for numbers in 118_16 70_64 230_32 352_32; do
    name=mla_cache_$numbers
    start "$name" mla "--kv-lora-rank ${numbers%_*} --qk-pos-emb-head-dim ${numbers#*_}"
    first "$name" mla 1e-3
    both "$name" mla 6e-4 _all '--trainable all'
done
# Which components turn with position, and other cuts of the same cache with that choice.
for kind in chosen chosen-once chosen_86_48 chosen_70_64 chosen_230_32 chosen_144_48; do
    flags="--mla-rotary ${kind%%_*}"
    if [[ $kind = *_* ]]; then
        numbers=${kind#*_}
        flags+=" --kv-lora-rank ${numbers%_*} --qk-pos-emb-head-dim ${numbers#*_}"
    fi
    name=mla_rotary_$kind
    start "$name" mla "$flags"
    first "$name" mla 1e-3
    both "$name" mla 6e-4 _all '--trainable all'
done
for name in "${starts[@]/%/_both}" "${starts[@]/%/_alone}" {mla,gate_swa}_teacher_own \
    gate_swa_{auto,sinks,logits,headwise,ungated}_both mla_cache mla_rotary edits; do
    step "report_$name" report - bash $this/arms.sh --work "$work" --report "$name" \
        --iterations "$iterations" --evaluate "$evaluate"
done
