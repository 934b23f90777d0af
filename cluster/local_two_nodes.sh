#!/usr/bin/env bash
# Two Ray nodes on this machine, bound to the loopback address, to try what crosses nodes.
#   cluster/local_two_nodes.sh start      then: ex4d preprocess CONFIG.yaml ray.address=127.0.0.1:6399
#   cluster/local_two_nodes.sh stop
set -euo pipefail
port=${EX4D_RAY_PORT:-6399}
cpus=${EX4D_NODE_CPUS:-1}
store=${EX4D_NODE_STORE_BYTES:-200000000}

case "${1:-}" in
start)
  ray start --head --node-ip-address=127.0.0.1 --port="$port" --num-cpus="$cpus" --include-dashboard=false \
    --object-store-memory="$store" --disable-usage-stats
  ray start --address="127.0.0.1:$port" --node-ip-address=127.0.0.1 --num-cpus="$cpus" \
    --object-store-memory="$store" --disable-usage-stats
  echo "two nodes: add ray.address=127.0.0.1:$port to a command"
  ;;
stop) ray stop ;;
*) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
