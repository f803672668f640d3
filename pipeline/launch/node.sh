#!/bin/sh
# One node's part of a training, under SLURM or SkyPilot: a process for each of its GPUs (without one, for each core).
# HEAD, the first node, is set by slurm.sbatch or sky.yaml; params.yaml: launch.train names this file.
exec torchrun --nnodes "${SLURM_NNODES:-${SKYPILOT_NUM_NODES:?}}" --node-rank "${SLURM_NODEID:-${SKYPILOT_NODE_RANK:?}}" \
    --nproc-per-node auto --rdzv-conf timeout="${PATIENCE:-900}" --master-addr "${HEAD:?}" --master-port "${PORT:-29400}" "$@"
