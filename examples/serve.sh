#!/usr/bin/env bash
# Serve an exported student, or any Hugging Face directory, with vLLM: start an OpenAI-compatible
# server on this machine, ask one question, print the answer, tokens per second and the cache, stop.
#
#   bash examples/serve.sh DIR [options] [-- more flags of vllm serve]
#
#   --port N          of the server, on 127.0.0.1 (default: a free one)
#   --prompt TEXT     the question (default: a beginning that any model can continue)
#   --max-tokens N    of the answer (default: 48)
#   --keep            leave the server running until Ctrl-C
#
# Makes .venv-serve where it is missing; ATTNEDIT_SERVE_PYTHON names another Python that has vLLM.
# On a CPU the cache has ATTNEDIT_CACHE_BYTES (default: 1 GiB).
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $*" >&2; exit 2; }
whole() { case $2 in '' | *[!0-9]* | 0) fail "$1 $2: expected a positive whole number" ;; esac }

model='' port='' prompt='The most important thing about' max_tokens=48 keep=''
while [ $# -gt 0 ]; do
    case $1 in
        --port | --prompt | --max-tokens) [ $# -ge 2 ] || fail "$1: needs a value" ;;&
        --port) port=$2; whole --port "$port"; shift 2 ;;
        --prompt) prompt=$2; shift 2 ;;
        --max-tokens) max_tokens=$2; whole --max-tokens "$max_tokens"; shift 2 ;;
        --keep) keep=yes; shift ;;
        --) shift; break ;;
        -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) fail "unknown argument $1; see --help" ;;
        *) [ -z "$model" ] || fail "$1: one directory, not two; see --help"; model=$1; shift ;;
    esac
done
[ -n "$model" ] || fail "name a directory; see --help"
case $model in /*) ;; *) model=$from/$model ;; esac
[ -d "$model" ] || fail "$model: no such directory"
[ -f "$model/config.json" ] || fail "$model: no config.json there"
command -v curl >/dev/null || fail "curl: not installed"

# shellcheck source=examples/env/serve_venv.sh
. examples/env/serve_venv.sh || exit 2
python=$ATTNEDIT_SERVE_PYTHON
command -v "$python" >/dev/null || fail "ATTNEDIT_SERVE_PYTHON=$python: no such program"

# A port that was asked for and is taken, or one that is free.
port=$("$python" - "${port:-0}" <<'PY'
import socket, sys
with socket.socket() as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        s.bind(("127.0.0.1", int(sys.argv[1])))
    except (OSError, OverflowError) as error:
        sys.exit(f"error: --port {sys.argv[1]}: {getattr(error, 'strerror', None) or error}")
    print(s.getsockname()[1])
PY
) || exit 2

flags=(--host 127.0.0.1 --port "$port" --served-model-name student)
sizes=$("$python" - "$model" 2>/dev/null <<'PY'
import json, sys
with open(f"{sys.argv[1]}/config.json") as file:
    config = json.load(file)
sliding = "sliding_attention" in (config.get("layer_types") or ())
print(min(4096, config.get("max_position_embeddings", 4096)), "sliding" if sliding else "full")
PY
) || fail "$model/config.json: not a model's configuration"
flags+=(--max-model-len "${sizes% *}")
batched=2048
if ! nvidia-smi -L >/dev/null 2>&1; then
    # Plain operations: vLLM's rotary kernel for CPUs rotates interleaved pairs wrongly.
    flags+=(--enforce-eager --kv-cache-memory-bytes "${ATTNEDIT_CACHE_BYTES:-1073741824}")
    flags+=(--compilation-config '{"custom_ops": ["none"]}')
    export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
    batched=256
fi
# A sliding layer reserves room for what is read of a prompt at a time, beside its window.
if [ "${sizes#* }" = sliding ]; then flags+=(--max-num-batched-tokens "$batched"); fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

SECONDS=0
log=$(mktemp -t attnedit-serve.XXXXXX)
server=''
# The server and what it started are a process group of their own.
stop() {
    if [ -z "$server" ]; then return; fi
    local signal
    for signal in TERM KILL; do
        kill "-$signal" -- "-$server" 2>/dev/null || true
        for _ in $(seq 100); do
            if ! kill -0 -- "-$server" 2>/dev/null; then break 2; fi
            sleep 0.1
        done
    done
    server=''
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "Start vLLM on 127.0.0.1:$port; log: $log"
# Not the vllm command: that of vLLM for the CPU asks for a package of another name.
setsid "$python" -m vllm.entrypoints.openai.api_server --model "$model" "${flags[@]}" "$@" >"$log" 2>&1 </dev/null &
server=$!
disown "$server" # bash says nothing when it is killed
url=http://127.0.0.1:$port
# The engine's own reason is the last line that names an error, but for those that point to it.
refused() {
    local pattern='([A-Za-z]*(Error|Exception):|Value error,) .+' reason
    reason=$(tr -d '\r' <"$log" | grep -aoE "$pattern" | tail -n 200 |
        grep -avE 'Engine core init|Engine process|EngineDead|Worker failed' | tail -n 1) || true
    fail "$model: vLLM refuses it: ${reason:-it ended without a word} (log: $log)"
}
while ! curl -sf -m 5 -o /dev/null "$url/health"; do
    if ! kill -0 "$server" 2>/dev/null; then
        refused
    fi
    if [ "$SECONDS" -gt "${ATTNEDIT_SERVE_TIMEOUT:-1200}" ]; then
        fail "$model: vLLM did not answer in $SECONDS seconds (log: $log)"
    fi
    sleep 0.5
done
echo "Ready after $SECONDS seconds; ask: $prompt"

ask() { # a completion as JSON, then its seconds; some engines refuse a model only now
    curl -sf -m 600 -w '\n%{time_total}' "$url/v1/completions" -H 'Content-Type: application/json' \
        -d "$("$python" -c 'import json, sys
print(json.dumps({"model": "student", "prompt": sys.argv[1], "max_tokens": int(sys.argv[2]),
                  "temperature": 0}))' "$1" "$2")"
}
ask "$prompt" 1 >/dev/null || refused # and compiles what is compiled
answer=$(ask "$prompt" "$max_tokens") || refused
"$python" -c 'import json, sys
answer, _, seconds = sys.argv[1].rpartition("\n")
found = json.loads(answer)
tokens = found["usage"]["completion_tokens"]
print("answer:", found["choices"][0]["text"].strip())
rate = tokens / float(seconds)
print(f"{tokens} tokens in {float(seconds):.2f} seconds: {rate:.1f} tokens/s, one at a time")' "$answer"
"$python" - "$log" "${ATTNEDIT_CACHE_BYTES:-1073741824}" "${sizes% *}" <<'PY'
import re, sys
text = open(sys.argv[1], errors="replace").read()
tokens = re.search(r"KV cache size: ([\d,]+) tokens", text)
gib = re.search(r"Available KV cache memory: ([\d.]+) GiB", text)
if tokens:
    count = int(tokens[1].replace(",", ""))
    size = float(gib[1]) * 2**30 if gib else int(sys.argv[2])
    print(f"cache: {size:,.0f} bytes hold {count:,} tokens in requests of {sys.argv[3]}, "
          f"{size / count:,.0f} bytes each")
PY
if [ -n "$keep" ]; then
    echo "Serving on $url/v1 until Ctrl-C"
    while kill -0 "$server" 2>/dev/null; do sleep 1; done
    fail "$model: the server ended by itself (log: $log)"
fi
rm -f "$log" # of a server that did what it should
