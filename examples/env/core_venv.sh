# shellcheck shell=bash
# Source this with a version of megatron-core, 0.16.0 to 0.19.x: makes an environment with it when it
# is missing or older than requirements.txt, and activates it.
#
#   . examples/env/core_venv.sh 0.19.2
#
# It is in ${XDG_CACHE_HOME:-~/.cache}/megatron_attnedit/, for all checkouts: for Python 3.12 and
# later, which megatron-core 0.17 and later need, torch may be a download of several GB.
# PYTHON names another interpreter.

# shellcheck source=examples/env/steps.sh
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

_attnedit_core_venv() {
    local root=$1 core=$2 venv=$3 oldest=12
    local stamp=$venv/requirements.stamp wanted python
    wanted="$core $(cksum <"$root/requirements.txt")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    case $core in 0.16.*) oldest=11 ;; esac
    python=$(_attnedit_find_python "$oldest" 13) || return 1
    mkdir -p "$venv" || return 1
    grep -v '^megatron-core==' "$root/requirements.txt" >"$venv/requirements.txt" || return 1
    _attnedit_make_venv "$root" "$venv" "$python" "requirements.txt with megatron-core $core" \
        -r "$venv/requirements.txt" "megatron-core==$core" || return 1
    echo "$wanted" >"$stamp"
}

_attnedit_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
_attnedit_core_folder=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_attnedit/core-$1
if _attnedit_core_venv "$_attnedit_root" "$1" "$_attnedit_core_folder"; then
    # This checkout's package, also for processes that are given no PYTHONPATH.
    echo "$_attnedit_root" >"$("$_attnedit_core_folder/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/megatron_attnedit.pth"
    # shellcheck disable=SC1091
    . "$_attnedit_core_folder/bin/activate"
    unset _attnedit_root _attnedit_core_folder
else
    unset _attnedit_root _attnedit_core_folder
    return 1
fi
