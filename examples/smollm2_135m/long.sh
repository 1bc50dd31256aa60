#!/usr/bin/env bash
# A longer last phase: a student that was trained on samples of 2048 tokens continues with samples of
# 8192, all the positions that the teacher has, and is judged with it at every length.
#
#   bash examples/smollm2_135m/long.sh [options] mla|gate_swa
#
#   --work DIR        what prepare.sh made (default: outputs/smollm2_135m)
#   --of NAME         the student in WORK/NAME/stage2 (default: the attention's name)
#   --iterations N    of 16 samples (default: 120, 15.7 M tokens)
#   --stage FLAGS     more flags of the training, such as "--recompute full" for a GPU
#                     with less memory: it keeps one layer's activations at a time
#   --processes N     GPUs that share every sample (context parallelism; default: 1)
#   --evaluate FLAGS  more flags of the evaluation
#   --no-evaluate     no report
#
# The student is WORK/NAME_8k; the report, before and after, is in WORK/NAME_8k/report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m of='' iterations=120 stage='' processes=1 evaluate=() report=yes attention=''
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --of) of=${2:?--of needs a name}; shift 2 ;;
        --iterations) iterations=${2:?--iterations needs a number}; shift 2 ;;
        --stage) stage=$2; shift 2 ;;
        --processes) processes=${2:?--processes needs a number}; shift 2 ;;
        --evaluate) read -ra evaluate <<<"$2"; shift 2 ;;
        --no-evaluate) report=''; shift ;;
        -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;;
        mla | gate_swa) attention=$1; shift ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ -z "$attention" ]; then
    echo "error: name an attention, mla or gate_swa; see --help" >&2
    exit 2
fi
of=${of:-$attention}
if [ ! -e "$work/$of/stage2" ]; then
    echo "error: $work/$of/stage2: no such folder; train that student with run.sh first" >&2
    exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
name=${of}_8k
flags='--seq-length 8192 --micro-batch-size 4 --global-batch-size 16 --lr 1e-4 --lr-decay-style cosine'
flags+=" --lr-wsd-decay-iters 0 --train-iters $iterations --context-parallel-size $processes $stage"
bash examples/smollm2_135m/run.sh --work "$work" --name "$name" --from "$work/$of/stage2" \
    --no-evaluate --processes "$processes" --stage2 "$flags" "$attention"
if [ -z "$report" ]; then exit 0; fi
python tools/evaluate.py --teacher "$work/teacher" --student "name=$of,after_stage2=$work/$of/stage2" \
    --student "name=$name,after_stage2=$work/$name/stage2" --text "$work/corpus/heldout.jsonl" \
    --seq-length 8192 --max-windows 10 --batch-size 2 --generations 0 --recall-probes 64 --prompts 0 \
    --generated-tasks needle,needles,variables,common_words --task-samples 64 \
    --output "$work/$name/report" "${evaluate[@]}"
