# shellcheck shell=bash
# Source this: makes .venv at the repository root when it is missing or older than
# requirements.txt, and activates it.
#
#   . examples/env/venv.sh
#
# PYTHON names another interpreter (3.11 or 3.12; the pins are tested with 3.11).

_attnedit_find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c '
import sys, ensurepip, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    echo "error: no Python 3.11 or 3.12 with the venv module found;" \
        "install python3.11 and python3.11-venv, or set PYTHON" >&2
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

_attnedit_venv() {
    local root=$1 venv=$1/.venv
    local stamp=$venv/requirements.stamp log=$venv/install.log wanted python torch
    # The root is part of the stamp because a copied .venv still points at its first home.
    wanted="$root $(cksum <"$root/requirements.txt")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    python=$(_attnedit_find_python) || return 1
    mkdir -p "$venv" && rm -f "$stamp" && : >"$log" || return 1
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check)
    _attnedit_step "create .venv with $("$python" --version)" "$log" \
        "$python" -m venv --upgrade-deps "$venv" || return 1
    # By itself and first: an unpinned torch would draw in gigabytes of another build.
    torch=$(grep '^torch==' "$root/requirements.txt") || return 1
    _attnedit_step "install $torch" "$log" "${pip[@]}" "$torch" || return 1
    _attnedit_step "install requirements.txt" "$log" \
        "${pip[@]}" -r "$root/requirements.txt" || return 1
    _attnedit_step "install this package" "$log" \
        "${pip[@]}" --no-deps --no-build-isolation -e "$root" || return 1
    echo "$wanted" >"$stamp"
}

_attnedit_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if _attnedit_venv "$_attnedit_root"; then
    # shellcheck disable=SC1091
    . "$_attnedit_root/.venv/bin/activate"
    unset _attnedit_root
else
    unset _attnedit_root
    return 1
fi
