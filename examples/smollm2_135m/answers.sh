#!/usr/bin/env bash
# The teacher's own answers to prompts about the training text, as data to train its students on.
#
#   bash examples/smollm2_135m/answers.sh [options]
#
#   --work DIR        what prepare.sh made (default: outputs/smollm2_135m)
#   --prompts N       prompts (default: 8000)
#   --server URL      a server that runs WORK/teacher, such as "vllm serve"; default: transformers
#   --loss-on WHICH   tokens of a conversation that count: completion (default) or all
#   --generate FLAGS  more flags of tools/generate_data.py, such as "--batch-size 256"; repeatable
#   --part NAME       answers, or answers_validation, alone (default: both)
#
# Writes WORK/answers (data.jsonl and its card), WORK/data/answers and, of some more prompts,
# WORK/data/answers_validation. Started again, it continues where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m prompts=8000 server='' loss_on=completion generate=() part=''
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --prompts) prompts=${2:?--prompts needs a number}; shift 2 ;;
        --server) server=${2:?--server needs an address}; shift 2 ;;
        --loss-on) loss_on=${2:?--loss-on needs completion or all}; shift 2 ;;
        --generate) read -ra more <<<"$2"; generate+=("${more[@]}"); shift 2 ;;
        --part) part=${2:?--part needs a name}; shift 2 ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ ! -f "$work/corpus/train.jsonl" ]; then
    echo "error: --work $work: no corpus there; run prepare.sh first" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$server" ]; then model=(--server "$server"); else model=(--model "$work/teacher"); fi

answers() { # TEXT PROMPTS FOLDER PREFIX
    python examples/smollm2_135m/prepare_prompts.py --text "$1" --count "$2" --output "$work/$3.prompts.jsonl"
    python tools/generate_data.py --prompts "$work/$3.prompts.jsonl" --output "$work/$3" "${model[@]}" \
        --temperature 0.8 --top-p 0.95 --max-new-tokens 512 --on-bad-row skip "${generate[@]}"
    python tools/preprocess_data.py --messages --input "$work/$3/data.jsonl" --tokenizer "$work/teacher" \
        --output "$work/data/$4" --loss-on "$loss_on" --seq-length 2048 --overwrite --show 1
}
if [ -n "$part" ] && [ "$part" != answers ] && [ "$part" != answers_validation ]; then
    echo "error: --part $part: expected answers or answers_validation" >&2
    exit 2
fi
if [ "$part" != answers ]; then
    answers "$work/corpus/validation.jsonl" "$((prompts / 50 + 8))" answers_of_validation answers_validation
fi
if [ "$part" != answers_validation ]; then
    answers "$work/corpus/train.jsonl" "$prompts" answers answers
fi
