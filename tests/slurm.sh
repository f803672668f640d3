#!/bin/sh
# A SLURM of one node on this machine, from the distribution's packages, that preempts and requeues:
#     slurm.sh install        once, as root (Debian, Ubuntu)
#     slurm.sh up FOLDER      its state, logs, key and slurm.conf are there; commands find it by SLURM_CONF=FOLDER/slurm.conf
#     slurm.sh down FOLDER
# Partition `low` yields to `high`. All listens on 127.0.0.1.
set -eu
case "$1" in
install)
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge
    exit
    ;;
esac
folder=$(realpath "$2")
stop() {
    for name in slurmd slurmctld munged; do
        if test -s "$folder/$name.pid"; then kill -KILL "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
    done
}
case "$1" in
down) stop ;;
up)
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 700 "$folder/munge"
    host=$(hostname -s)
    cpus=$(env -u OMP_NUM_THREADS nproc)  # nproc counts OMP_NUM_THREADS instead
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 2>/dev/null
    chmod 400 "$folder/munge/key"
    cat >"$folder/slurm.conf" <<CONFIGURATION
ClusterName=diva
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,ttl=60,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1
PartitionName=high Nodes=$host PriorityTier=10
CONFIGURATION
    munged --force --key-file "$folder/munge/key" --socket "$folder/munge.socket" --pid-file "$folder/munged.pid" \
        --log-file "$folder/munge/log" --seed-file "$folder/munge/seed"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c
    slurmd -c
    for _ in $(seq 100); do
        if sinfo --noheader --format %t | grep -q idle; then exit 0; fi
        sleep 0.2
    done
    sinfo --long >&2
    tail -n 5 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
    exit 1
    ;;
esac
