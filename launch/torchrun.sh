#!/usr/bin/env bash
# Starts a Megatron job with torchrun, one process per device, on one node or on several.
#
#   launch/torchrun.sh pretrain_gpt.py MEGATRON-ARGS --galvatron-auto
#
# On several nodes run it on each, with the same MASTER_ADDR and, by node, NODE_RANK:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh ...
#
# RANKS_PER_NODE  processes on this node (default: the GPUs in CUDA_VISIBLE_DEVICES, else those that nvidia-smi
#                 lists, else 1)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT  as torchrun has them
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/devices.sh"
ranks_of_this_node
# Megatron wants it for tensor parallelism: kernels start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
where=(--nproc-per-node "$ranks" --nnodes "${NNODES:-1}")
if [ "${NNODES:-1}" = 1 ]; then
  # Any free port: several jobs may run on one machine.
  where+=(--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0)
else
  [ -n "${NODE_RANK:-}" ] || stop "NODE_RANK: not set for NNODES=$NNODES; valid: the number of this node, from 0"
  [ -n "${MASTER_ADDR:-}" ] || stop "MASTER_ADDR: not set for NNODES=$NNODES; valid: the first node's name"
  where+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" "$@"
