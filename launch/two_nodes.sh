#!/usr/bin/env bash
# Two "nodes" on one machine: two network namespaces joined by a virtual cable of a limited rate, some ranks in each.
# For tests and experiments with slow links. Needs root, iproute2 and tc.
#
#   bash launch/two_nodes.sh RATE RANKS_PER_NODE COMMAND ARGS...
#
# RATE is tc's (200mbit, 1gbit, 10gbit). COMMAND runs once per rank with RANK, LOCAL_RANK, WORLD_SIZE,
# LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. The exit code is 0 where every rank's is.
set -euo pipefail
RATE=$1 PER_NODE=$2
shift 2
NAME=g$$
A=${NAME}a B=${NAME}b
# 10.98.x.y by process number, so that two of these run side by side.
NET=10.98.$(($$ % 254))
clean() {
  for rank in "${ranks[@]:-}"; do [ -z "$rank" ] || kill -9 "$rank" 2>/dev/null || true; done
  ip netns del "$A" 2>/dev/null || true
  ip netns del "$B" 2>/dev/null || true
}
# What passes at once after a pause, at full speed. A cable knows no such thing: with 256 KB, messages of that
# size would never see the rate of a slow one. A fast one needs more, for timers are not finer than some 0.1 ms.
case $RATE in
  [1-9][0-9]*gbit) BURST=256kb ;;
  *) BURST=32kb ;;
esac
ranks=()
trap clean EXIT
for node in "$A" "$B"; do
  ip netns add "$node"
  ip -n "$node" link set lo up
done
ip link add "v$A" netns "$A" type veth peer name "v$B" netns "$B"
ip -n "$A" addr add "$NET.1/24" dev "v$A"
ip -n "$B" addr add "$NET.2/24" dev "v$B"
for node in "$A" "$B"; do
  ip -n "$node" link set "v$node" up
  ip netns exec "$node" tc qdisc add dev "v$node" root tbf rate "$RATE" burst "$BURST" latency 400ms
done
export MASTER_ADDR=$NET.1 MASTER_PORT=${MASTER_PORT:-29400}
export WORLD_SIZE=$((2 * PER_NODE)) LOCAL_WORLD_SIZE=$PER_NODE
number=0
for node in "$A" "$B"; do
  for ((local = 0; local < PER_NODE; local++)); do
    RANK=$number LOCAL_RANK=$local GLOO_SOCKET_IFNAME=v$node ip netns exec "$node" "$@" &
    ranks+=($!)
    number=$((number + 1))
  done
done
status=0
for rank in "${ranks[@]}"; do wait "$rank" || status=$?; done
ranks=()
exit "$status"
