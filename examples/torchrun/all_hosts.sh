#!/usr/bin/env bash
# Start train.sh on every host of a list by ssh, and wait for all. The repository lies at the same
# path everywhere; the first host is MASTER_ADDR.
#
#   bash examples/torchrun/all_hosts.sh host0,host1 stage1 RECIPE --teacher ...
#
# Ends with the highest exit code of the hosts (see train.sh). SIGTERM, SIGUSR1 and SIGINT (Ctrl-C)
# are handed on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
IFS=, read -r -a hosts <<<"${1:?host,host,...}"
shift
remote=${ATTNEDIT_SSH:-ssh}
patience=${ATTNEDIT_PATIENCE:-60}

words=$(printf '%q ' "$@")
variables=$(printf '%q ' NNODES="${#hosts[@]}" MASTER_ADDR="${hosts[0]}" \
    MASTER_PORT="${MASTER_PORT:-29500}" RUN_ID="${RUN_ID:-attnedit-$$}" \
    ATTNEDIT_ENV="${ATTNEDIT_ENV:-gpu}" ATTNEDIT_DEVICES="${ATTNEDIT_DEVICES:-8}" \
    ATTNEDIT_LOGS="${ATTNEDIT_LOGS:-logs}")

# On every host a file for the launcher's process id, by a name that nobody else can take before.
names=$(mktemp -d)
# shellcheck disable=SC2329
clean() {
    for i in "${!ids[@]}"; do
        # shellcheck disable=SC2029
        timeout 20 "$remote" "${hosts[i]}" "rm -f $(printf %q "${ids[i]}")" </dev/null &
    done
    wait
    rm -rf "$names"
}
ids=() making=()
trap clean EXIT
for i in "${!hosts[@]}"; do
    # shellcheck disable=SC2016
    "$remote" "${hosts[i]}" 'mktemp "${TMPDIR:-/tmp}/attnedit.XXXXXXXXXX"' \
        </dev/null >"$names/$i" &
    making+=($!)
done
for pid in "${making[@]}"; do wait "$pid"; done
for i in "${!hosts[@]}"; do ids+=("$(tail -n 1 "$names/$i")"); done

started=()
for i in "${!hosts[@]}"; do
    # The shell's own id is the launcher's: it turns into it by exec.
    # shellcheck disable=SC2029
    "$remote" "${hosts[i]}" "cd $(printf %q "$root") && echo \$\$ >$(printf %q "${ids[i]}") && \
        exec env $variables bash examples/torchrun/train.sh $words" </dev/null &
    started+=($!)
done

# shellcheck disable=SC2329
hand_on() {
    for i in "${!hosts[@]}"; do
        # shellcheck disable=SC2029
        "$remote" "${hosts[i]}" "kill -$1 \$(cat $(printf %q "${ids[i]}"))" </dev/null || true
    done
}
trap 'hand_on TERM' TERM
trap 'hand_on USR1' USR1
trap 'hand_on INT' INT

# Looked at every second. A host that fails takes the others, which may wait for it, down
# $patience seconds later: SIGHUP ends their ranks without a checkpoint.
highest=0 ended='' left=("${started[@]}")
while [ ${#left[@]} -gt 0 ]; do
    still=()
    for pid in "${left[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            still+=("$pid")
            continue
        fi
        wait "$pid" && code=0 || code=$?
        if [ "$code" -gt "$highest" ]; then highest=$code; fi
        if [ "$code" -ne 0 ] && [ -z "$ended" ]; then ended=$SECONDS; fi
    done
    left=("${still[@]}")
    if [ -n "$ended" ] && [ "${#left[@]}" -gt 0 ] && [ $((SECONDS - ended)) -ge "$patience" ]; then
        hand_on HUP
        ended=$((SECONDS + 60))
    fi
    sleep 1 || true # a terminal's signal ends it, too
done
exit "$highest"
