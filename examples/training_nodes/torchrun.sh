#!/usr/bin/env bash
# On each of the machines, with the same addresses (the first argument is a machine that all reach, most simply the first):
#   bash examples/training_nodes/torchrun.sh 10.0.0.1 configs/emoji-diffusion-gpu.yaml /shared/run
#
# NODES machines of GPUS GPUs. The run folder, the cache and the pictures are on a disk that all see. When a process or a
# machine is lost, torchrun ends the others and waits until there are NODES machines again (give the command there once
# more), and all go on from the newest checkpoint.
set -euo pipefail
nodes=${NODES:-2} gpus=${GPUS:-8} head=$1 config=$2 out=$3
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
exec torchrun --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_endpoint "$head:29500" \
    --rdzv_id "$(basename "$out")" --max_restarts 100 \
    -m latentdiff train "$config" --resume --out "$out"
