#!/usr/bin/env bash
# Start train.sh on every host of a list by ssh, and wait for all. The repository lies at the same
# path everywhere; the first host is MASTER_ADDR.
#
#   bash examples/torchrun/all_hosts.sh host0,host1 stage1 RECIPE --teacher ...
#
# Ends with the highest exit code of the hosts (see train.sh). SIGTERM and SIGUSR1 are handed on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
IFS=, read -r -a hosts <<<"${1:?host,host,...}"
shift
remote=${ATTNEDIT_SSH:-ssh}

words=$(printf '%q ' "$@")
variables=$(printf '%q ' NNODES="${#hosts[@]}" MASTER_ADDR="${hosts[0]}" \
    MASTER_PORT="${MASTER_PORT:-29500}" RUN_ID="${RUN_ID:-attnedit-$$}" \
    ATTNEDIT_ENV="${ATTNEDIT_ENV:-gpu}" ATTNEDIT_DEVICES="${ATTNEDIT_DEVICES:-8}" \
    ATTNEDIT_LOGS="${ATTNEDIT_LOGS:-logs}")
ids=$(printf %q "/tmp/attnedit-$$-$RANDOM")
started=()
for i in "${!hosts[@]}"; do
    # The shell's own id is the launcher's: it turns into it by exec.
    # shellcheck disable=SC2029
    "$remote" "${hosts[i]}" "cd $(printf %q "$root") && echo \$\$ >$ids-$i && \
        exec env $variables bash examples/torchrun/train.sh $words" </dev/null &
    started+=($!)
done

# shellcheck disable=SC2329
hand_on() {
    for i in "${!hosts[@]}"; do
        # shellcheck disable=SC2029
        "$remote" "${hosts[i]}" "kill -$1 \$(cat $ids-$i)" </dev/null || true
    done
}
trap 'hand_on TERM' TERM
trap 'hand_on USR1' USR1

highest=0
for pid in "${started[@]}"; do
    code=0
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
