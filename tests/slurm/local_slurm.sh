#!/usr/bin/env bash
# A real SLURM on the loopback interface, as root, from Debian's packages: slurmctld, slurmd,
# slurm-client, munge. Partition `high` preempts jobs of partition `low` and requeues them; both have
# one node. Partition `pair` has two, which are this machine under two names.
#
#   tests/slurm/local_slurm.sh start DIR   then: export SLURM_CONF=DIR/slurm.conf; sbatch ...
#   tests/slurm/local_slurm.sh stop DIR
set -euo pipefail
action=${1:?start or stop} dir=${2:?folder for state and logs}

stop() {
    for file in "$dir"/*.pid; do
        if [ -f "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
    done
}

start() {
    local host
    host=$(hostname -s)
    mkdir -p "$dir"/{state,log,munge} "$dir/spool"/{localhost,"$host"}
    # The waits are short: one node, and requeued jobs otherwise rest for two minutes.
    cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldPort=17817
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
ReturnToService=2
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=$host NodeAddr=127.0.0.1 Port=17818
NodeName=localhost NodeHostname=$host NodeAddr=127.0.0.1 Port=17819
PartitionName=low Nodes=$host Default=YES PriorityTier=1 GraceTime=60 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$host PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE State=UP
PartitionName=pair Nodes=ALL PreemptMode=OFF MaxTime=INFINITE State=UP
CONF
    head -c 1024 /dev/urandom >"$dir/munge/key"
    chmod 700 "$dir/munge" && chmod 400 "$dir/munge/key" && chmod 755 "$dir"
    chown -R munge: "$dir/munge"
    # Clients reach the socket through its folder.
    chmod 711 "$dir/munge"
    runuser -u munge -- munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" \
        --pid-file="$dir/munge/pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    ln -sf munge/pid "$dir/munged.pid"
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd -N "$host"
    slurmd -N localhost
    for _ in $(seq 60); do
        if [ "$(sinfo -h -N -p pair -t idle -o %N 2>/dev/null | wc -l)" -eq 2 ]; then return; fi
        sleep 0.5
    done
    echo "error: the nodes do not come up; see $dir/log" >&2
    return 1
}

case $action in
    start) start ;;
    stop) stop ;;
    *) echo "error: $action: expected start or stop" >&2 && exit 2 ;;
esac
