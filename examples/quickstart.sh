#!/usr/bin/env bash
# The whole pipeline on the embedded teacher, for both student attentions, on two processes.
#
#   bash examples/quickstart.sh [--teacher DIR] [--output DIR] [--compare-init]
#
#   --teacher DIR     Hugging Face directory of a Qwen3 or Llama model (default: the embedded one)
#   --output DIR      results (default: outputs/quickstart of the repository); started afresh
#   --compare-init    also train students from the paper's random start, beside the default's
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# What a user names is where the user is.
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$from" "$1" ;; esac }

teacher=examples/embedded_teacher/model
output=outputs/quickstart
inits=(teacher)
while [ $# -gt 0 ]; do
    case $1 in
        --teacher) teacher=$(absolute "${2:?--teacher needs a directory}"); shift 2 ;;
        --output) output=$(absolute "${2:?--output needs a directory}"); shift 2 ;;
        --compare-init) inits=(teacher random); shift ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
if [ ! -f "$teacher/config.json" ]; then
    echo "error: --teacher $teacher: no config.json there" >&2
    exit 2
fi

if [ -n "$(ls -A "$output" 2>/dev/null)" ] && [ ! -f "$output/.quickstart" ]; then
    echo "error: --output $output: not a quick start's; it would be removed" >&2
    exit 2
fi

# shellcheck source=examples/env/venv.sh
. examples/env/venv.sh
# shellcheck source=examples/env/cpu.sh
. examples/env/cpu.sh

text=examples/embedded_teacher/text
recipes=examples/quickstart
torchrun=(torchrun --nproc-per-node 2)
SECONDS=0
# Steps of one process may use both cores.
alone() { OMP_NUM_THREADS=2 python "$@"; }
say() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }

grid=(--tensor-model-parallel-size 2)
if ! why=$(python tools/plan.py --teacher "$teacher" --student-attention mla "${grid[@]}" 2>&1 >/dev/null)
then
    printf '%s\n' "$why" "Data parallel 2 instead of tensor parallel 2."
    grid=(--tensor-model-parallel-size 1)
fi

dtype=(--no-bf16)
if python -c "import sys; from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported
sys.exit(not (_is_amx_tile_supported() or _is_avx512_bf16_supported()))" 2>/dev/null; then
    dtype=(--bf16) # half as fast again where processors multiply bfloat16, twice with matrix units
fi
# What fits a 7M-parameter teacher: a cache of 204 elements per token and layer instead of 512; and
# trying every layer takes seconds.
mla_flags=()
gate_swa_flags=()
if [ "$teacher" -ef examples/embedded_teacher/model ]; then
    mla_flags=(--kv-lora-rank 156 --qk-pos-emb-head-dim 48)
    gate_swa_flags=(--full-layers auto)
fi

rm -rf "$output"
mkdir -p "$output/data"
touch "$output/.quickstart"

say "Tokenize the text; import the teacher: Hugging Face -> Megatron"
jobs=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for name in stage1 stage2 validation; do
    python tools/preprocess_data.py --input "$text/$name.jsonl.gz" --tokenizer "$teacher" \
        --output "$output/data/$name" &
    jobs+=($!)
done
python tools/convert_checkpoint.py import --input "$teacher" --output "$output/teacher" &
jobs+=($!)
for job in "${jobs[@]}"; do wait "$job"; done # stops at one that failed

students=()
for init in "${inits[@]}"; do
    for attention in mla gate_swa; do
        name=$attention
        if [ "$init" = random ]; then name=${attention}_random; fi
        run=$output/$name
        common=(--teacher "$output/teacher" --valid-data-path "$output/data/validation"
            --data-cache-path "$output/data/cache" "${grid[@]}" "${dtype[@]}")

        flags=("${mla_flags[@]}")
        if [ "$attention" = gate_swa ]; then flags=("${gate_swa_flags[@]}"); fi

        say "$name: edit"
        alone tools/edit_checkpoint.py --teacher "$output/teacher" --save "$run/edit" \
            --student-attention "$attention" --init "$init" \
            --calibration-data-path "$output/data/stage1" --calibration-tokens 16384 "${flags[@]}"
        say "$name: stage 1, layer-wise"
        "${torchrun[@]}" tools/pretrain_stage1.py --recipe "$recipes/${attention}_stage1.yaml" \
            "${common[@]}" --train-data-path "$output/data/stage1" --load "$run/edit" --save "$run/stage1"
        say "$name: stage 2, model-level"
        "${torchrun[@]}" tools/pretrain_stage2.py --recipe "$recipes/${attention}_stage2.yaml" \
            "${common[@]}" --train-data-path "$output/data/stage2" --load "$run/stage1" --save "$run/stage2"
        say "$name: export, Megatron -> Hugging Face"
        python tools/convert_checkpoint.py export --input "$run/stage2" --output "$run/hf"
        students+=(--student "name=$name,after_edit=$run/edit,after_stage1=$run/stage1,after_stage2=$run/stage2")
    done
done

say "Evaluate on held-out text"
alone tools/evaluate.py --teacher "$teacher" "${students[@]}" --text "$text/heldout.jsonl.gz" \
    --seq-length 1024 --max-windows 48 --generations 0 --recall-probes 0 --output "$output/report"
say "Done. Students to load with transformers: $output/*/hf"
