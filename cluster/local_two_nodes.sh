#!/usr/bin/env bash
# Two Ray nodes on this machine, to test communication between nodes. They require the token of ~/.ray/auth_token.
#   cluster/local_two_nodes.sh start      then: ex4d preprocess CONFIG.yaml ray.address=127.0.0.1:6399
#   cluster/local_two_nodes.sh stop       ends these two nodes and no other Ray
set -euo pipefail
umask 077
port=${EX4D_RAY_PORT:-6399}
cpus=${EX4D_NODE_CPUS:-1}
store=${EX4D_NODE_STORE_BYTES:-200000000}
state=${XDG_STATE_HOME:-$HOME/.local/state}/ex4d/two_nodes_$port

node() {  # name, arguments of `ray start`
  local name=$1
  shift
  setsid ray start "$@" --node-ip-address=127.0.0.1 --num-cpus="$cpus" --object-store-memory="$store" \
    --disable-usage-stats --block >"$state/$name.log" 2>&1 &
  echo $! >"$state/$name.pid"
}

await() {
  for _ in $(seq 60); do
    if ray health-check --address "127.0.0.1:$port" >/dev/null 2>&1; then return; fi
    sleep 1
  done
  echo "the node did not start within a minute; see $state" >&2
  exit 1
}

case "${1:-}" in
start)
  if [ -e "$state/head.pid" ] && kill -0 "$(cat "$state/head.pid")" 2>/dev/null; then
    echo "already running: add ray.address=127.0.0.1:$port to a command" >&2
    exit 1
  fi
  token=$(${EX4D_BIN:-ex4d} cluster token)  # not inside eval, where a failure would start Ray without a token
  eval "$token"
  mkdir -p "$state"
  node head --head --port="$port" --include-dashboard=false
  await
  node worker --address="127.0.0.1:$port"
  echo "two nodes: add ray.address=127.0.0.1:$port to a command"
  ;;
stop)
  for name in worker head; do
    if [ -e "$state/$name.pid" ]; then
      pid=$(cat "$state/$name.pid")
      # Its session: `ray start --block` and everything that it started.
      if pgrep -s "$pid" >/dev/null; then
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 20); do pgrep -s "$pid" >/dev/null || break; sleep 0.5; done
        pkill -KILL -s "$pid" || true
      fi
      rm "$state/$name.pid"
    fi
  done
  ;;
*) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
