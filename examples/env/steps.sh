# shellcheck shell=bash
# Source this: what the scripts that make a Python environment share.

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
