#!/bin/sh
# A SLURM of one node on this machine, from the distribution's packages, that preempts and requeues:
#     slurm.sh up FOLDER      its key, state, logs and slurm.conf are there; it runs in network namespace diva-slurm, so no
#                             port of the machine is used: SLURM_CONF=FOLDER/slurm.conf nsenter --net=/run/netns/diva-slurm sinfo
#     slurm.sh down           ends all that runs in the namespace
# Needs root, iproute2, and (Debian, Ubuntu) apt-get install slurmctld slurmd slurm-client munge.
# Partition `low` yields to `high`.
set -eu
inside="nsenter --net=/run/netns/diva-slurm" # `ip netns exec` would hide the cgroups
down() {
    if ip netns list | grep -q '^diva-slurm\b'; then
        while running=$(ip netns pids diva-slurm) && test -n "$running"; do
            kill -KILL $running 2>/dev/null || true
            sleep 0.1
        done
        ip netns delete diva-slurm
    fi
}
case "$1" in
down) down ;;
up)
    down
    folder=$(realpath "$2")
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 700 "$folder/munge"
    cpus=$(env -u OMP_NUM_THREADS nproc) # nproc counts OMP_NUM_THREADS instead
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 2>/dev/null
    chmod 400 "$folder/munge/key"
    # cred_expire: a requeued job waits as long before it starts again.
    cat >"$folder/slurm.conf" <<CONFIGURATION
ClusterName=diva
SlurmctldHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MpiDefault=none
NodeName=localhost CPUs=$cpus State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1
PartitionName=high Nodes=localhost PriorityTier=10
CONFIGURATION
    ip netns add diva-slurm
    ip -n diva-slurm link set lo up
    # SLURM resolves names only where there is an interface beside the loopback.
    ip link add one netns diva-slurm type veth peer name two netns diva-slurm
    ip -n diva-slurm address add 10.78.0.1/24 dev one
    for name in one two; do ip -n diva-slurm link set "$name" up; done
    export SLURM_CONF="$folder/slurm.conf"
    $inside munged --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" --pid-file "$folder/munge/pid" \
        --log-file "$folder/munge/log" --seed-file "$folder/munge/seed"
    $inside slurmctld -c
    $inside slurmd -c -N localhost
    for _ in $(seq 150); do
        if $inside sinfo --noheader --format %t 2>/dev/null | grep -qx idle; then exit 0; fi
        sleep 0.2
    done
    tail -n 20 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
    exit 1
    ;;
esac
