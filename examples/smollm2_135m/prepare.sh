#!/usr/bin/env bash
# Teacher and text of the SmolLM2 experiments: downloads, conversion, tokens.
#
#   bash examples/smollm2_135m/prepare.sh [--work DIR] [--workers N]
#
#   --work DIR     everything goes there, 5 GB (default: outputs/smollm2_135m)
#   --workers N    processes that tokenize (default: 2)
#
# Needs Debian 12 for the text (README.md), its list of packages (`apt-get update`), and
# `pip install -r examples/smollm2_135m/requirements.txt`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=outputs/smollm2_135m
workers=2
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=${2:?--work needs a directory}; shift 2 ;;
        --workers) workers=${2:?--workers needs a number}; shift 2 ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
done
here=examples/smollm2_135m
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

[ -f "$work/teacher/config.json" ] ||
    python $here/prepare_teacher.py --work "$work" --output "$work/teacher"
[ -f "$work/corpus/sources.json" ] ||
    python examples/embedded_teacher/prepare_corpus.py --work "$work/corpus" --corpus-only \
        --packages examples/embedded_teacher/packages.txt $here/packages.txt \
        --held-out python-django-doc --with-code --max-mb 40
for split in train validation; do
    [ -f "$work/data/$split.json" ] ||
        python tools/preprocess_data.py --input "$work/corpus/$split.jsonl" \
            --tokenizer "$work/teacher" --output "$work/data/$split" --workers "$workers"
done
echo "teacher, data and held-out text are in $work; next: bash $here/run.sh --work $work mla"
