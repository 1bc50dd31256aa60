# shellcheck shell=bash
# Source this: makes .venv at the repository root when it is missing or older than
# requirements.txt, and activates it.
#
#   . examples/env/venv.sh
#
# PYTHON names another interpreter (3.11 or 3.12; the pins are tested with 3.11).

# shellcheck source=examples/env/steps.sh
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

_attnedit_venv() {
    local root=$1 venv=$1/.venv
    local stamp=$venv/requirements.stamp wanted python
    # The root is part of the stamp because a copied .venv still points at its first home.
    wanted="$root $(cksum <"$root/requirements.txt")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return 0
    fi
    python=$(_attnedit_find_python) || return 1
    _attnedit_make_venv "$root" "$venv" "$python" requirements.txt \
        -r "$root/requirements.txt" || return 1
    _attnedit_step "install this package" "$venv/install.log" "$venv/bin/python" -m pip install \
        --disable-pip-version-check --no-deps --no-build-isolation -e "$root" || return 1
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
