#!/usr/bin/env bash
# Starts a Megatron job with the deepspeed launcher, one process per device, on one node or on several.
#
#   launch/deepspeed.sh pretrain_gpt.py MEGATRON-ARGS --galvatron-auto
#
# On several nodes either once, from any of them, with HOSTFILE (lines "node slots=8") and ssh between them; or,
# without ssh, on each of them with the same HOSTFILE and MASTER_ADDR and, by node, NODE_RANK.
#
# RANKS_PER_NODE  processes on this node, without HOSTFILE (default: the GPUs in CUDA_VISIBLE_DEVICES, else those
#                 that nvidia-smi lists, else 1)
# HOSTFILE, NODE_RANK, MASTER_ADDR, MASTER_PORT  as above; NODE_RANK, or a HOSTFILE of this node alone: no ssh.
#                 Without HOSTFILE a /job/hostfile, which deepspeed itself would take, is not looked at.
# DRY_RUN=1       prints the command instead of running it
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,15s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/devices.sh"
free_port() { "${PYTHON:-python}" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
if [ -n "${PYTHON:-}" ] && [ -x "$(dirname "$PYTHON")/deepspeed" ]; then
  start=("$PYTHON" "$(dirname "$PYTHON")/deepspeed")
else
  command -v deepspeed >/dev/null || stop "no deepspeed command; install deepspeed, or set PYTHON to an environment's that has it"
  start=(deepspeed)
fi
# Megatron wants it for tensor parallelism: kernels start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
if [ -n "${HOSTFILE:-}" ]; then
  [ -r "$HOSTFILE" ] || stop "HOSTFILE: $HOSTFILE cannot be read; valid: lines such as 'node0 slots=8'"
  [ -z "${RANKS_PER_NODE:-}" ] || stop "RANKS_PER_NODE: $RANKS_PER_NODE beside HOSTFILE, whose slots say it; valid: one of them"
  ranks_of_this_node
  if [ ${#devices[@]} -gt 0 ]; then
    [ "$CUDA_VISIBLE_DEVICES" = "$(seq -s, 0 $((${#devices[@]} - 1)))" ] || stop "CUDA_VISIBLE_DEVICES: $CUDA_VISIBLE_DEVICES beside HOSTFILE, whose slots are the first devices of a node; valid: one of them"
  fi
  where=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
  hosts=$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$HOSTFILE")
  if [ -z "${NODE_RANK:-}" ] && [ -n "$hosts" ] && [ "$(wc -l <<<"$hosts")" -eq 1 ]; then
    # deepspeed would ask for ssh even to the node it runs on.
    for name in localhost 127.0.0.1 "$(hostname)" "$(hostname -s)" $(hostname -I 2>/dev/null); do
      if [ "$hosts" = "$name" ]; then NODE_RANK=0 MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}; fi
    done
  fi
  if [ -n "${NODE_RANK:-}" ]; then
    [ -n "${MASTER_ADDR:-}" ] || stop "MASTER_ADDR: not set; valid with NODE_RANK: the first node's name"
    where+=(--no_ssh --node_rank "$NODE_RANK")
  fi
  [ -z "${MASTER_ADDR:-}" ] || where+=(--master_addr "$MASTER_ADDR")
else
  [ -z "${NODE_RANK:-}" ] || stop "NODE_RANK: $NODE_RANK without HOSTFILE, which lists the nodes"
  ranks_of_this_node
  # No file: with the usual one, /job/hostfile, deepspeed would start other nodes and ignore the devices given here.
  where=(--hostfile /dev/null)
  if [ ${#devices[@]} -gt 0 ]; then
    # With --num_gpus, deepspeed would take the first GPUs of the node, whoever they were given to.
    [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]] || stop "CUDA_VISIBLE_DEVICES: $CUDA_VISIBLE_DEVICES; the deepspeed launcher takes numbers alone; valid: such as 0,1, or launch/torchrun.sh"
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${devices[*]:0:$ranks}")
    export CUDA_VISIBLE_DEVICES
  else
    where+=(--num_gpus "$ranks")
  fi
  # Any free port: several jobs may run on one machine.
  where+=(--master_addr 127.0.0.1 --master_port "${MASTER_PORT:-$(free_port)}")
fi
if [ -n "${DRY_RUN:-}" ]; then
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || printf 'CUDA_VISIBLE_DEVICES=%s ' "$CUDA_VISIBLE_DEVICES"
  printf '%q ' "${start[@]}" "${where[@]}" "$@"
  echo
  exit 0
fi
exec "${start[@]}" "${where[@]}" "$@"
