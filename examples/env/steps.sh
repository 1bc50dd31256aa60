# shellcheck shell=bash
# Source this: what the scripts that make a Python environment share.

# The first Python 3.OLDEST to 3.NEWEST with the venv module; PYTHON goes before all others.
_attnedit_find_python() {
    local oldest=${1:-11} newest=${2:-12} minor candidate
    local candidates=("${PYTHON:-}")
    for minor in $(seq "$oldest" "$newest"); do candidates+=("python3.$minor"); done
    candidates+=(python3 python)
    for minor in $(seq "$oldest" "$newest"); do
        candidates+=("${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python3)
    done
    for candidate in "${candidates[@]}"; do
        if [ -n "$candidate" ] && "$candidate" -c "
import sys, ensurepip, venv
sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.$oldest to 3.$newest with the venv module found;" \
        "install python3.$oldest and python3.$oldest-venv, or set PYTHON" >&2
    return 1
}

# One line of progress; the rest goes to the log, whose end is shown when the step fails.
_attnedit_step() {
    local title=$1 log=$2
    shift 2
    printf '[venv] %s\n' "$title" >&2
    if ! "$@" >>"$log" 2>&1 </dev/null; then
        echo "error: '$title' failed; the end of $log:" >&2
        tail -n 20 "$log" >&2
        return 1
    fi
}

# _attnedit_make_venv ROOT VENV PYTHON WHAT PIP-ARGUMENTS: the pinned torch, then the arguments.
_attnedit_make_venv() {
    local root=$1 venv=$2 python=$3 what=$4 log=$2/install.log torch
    shift 4
    mkdir -p "$venv" && rm -f "$venv/requirements.stamp" && : >"$log" || return 1
    local install=("$venv/bin/python" -m pip install --disable-pip-version-check)
    _attnedit_step "create $venv with $("$python" --version)" "$log" \
        "$python" -m venv --upgrade-deps "$venv" || return 1
    # By itself and first: an unpinned torch would draw in gigabytes of another build.
    torch=$(grep '^torch==' "$root/requirements.txt") || return 1
    _attnedit_step "install $torch" "$log" "${install[@]}" "$torch" || return 1
    _attnedit_step "install $what" "$log" "${install[@]}" "$@" || return 1
}
