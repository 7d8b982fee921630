# For the other starters, which read it: the devices of this node that a job was given, and how many ranks that makes.
# An empty CUDA_VISIBLE_DEVICES, -1 and Slurm's NoDevFiles give it none: then it runs on processors.

stop() { echo "launch/$(basename "$0"): $*" >&2; exit 2; }

# Sets devices (an array; empty where nothing names them) and ranks.
ranks_of_this_node() {
  devices=()
  case ${CUDA_VISIBLE_DEVICES-unset} in
    unset | "" | -1 | NoDevFiles) ;;
    *) IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES" ;;
  esac
  ranks=${RANKS_PER_NODE:-${#devices[@]}}
  if [ -z "${RANKS_PER_NODE:-}" ] && [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
    ranks=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)
  fi
  if [ -z "${RANKS_PER_NODE:-}" ] && [ "$ranks" -eq 0 ]; then ranks=1; fi
  [[ "$ranks" =~ ^[1-9][0-9]*$ ]] || stop "RANKS_PER_NODE: $ranks; valid: a number from 1"
  if [ ${#devices[@]} -gt 0 ] && [ "$ranks" -gt ${#devices[@]} ]; then
    stop "RANKS_PER_NODE: $ranks, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; valid: 1 to ${#devices[@]}"
  fi
}
