#!/usr/bin/env bash
# The mesh on one machine without containers, each service a process of its own: starts them, waits until all are ready, says where to ask, and stops
# them on Ctrl-C. One that is killed, or told to end, comes back; one that ends with an error stops everything.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  cat >&2 <<USAGE
usage: deploy/up.sh [--models DIR] [--data DIR] [--port PORT] [--bin DIR] [--postgres]
  --models DIR   the model suite [models/sketch]
  --data DIR     everything that is kept: results, pictures, uploads, logs, process ids, the database [out/up]
  --port PORT    the orchestrator's port; the others take the twenty after it [50051]
  --bin DIR      where the programs are [target/release, else target/debug]
  --postgres     keep jobs in a PostgreSQL server of its own (Debian: apt install postgresql) and not in a SQLite file
USAGE
  exit 2
}

fail() { echo "up: $1" >&2; exit 1; }

models=$root/models/sketch data=$root/out/up port=50051 bin= postgres=
while [ $# -gt 0 ]; do
  case $1 in
    --models) models=${2:-} ;;
    --data) data=${2:-} ;;
    --port) port=${2:-} ;;
    --bin) bin=${2:-} ;;
    --postgres) postgres=yes; shift; continue ;;
    *) usage ;;
  esac
  [ -n "${2:-}" ] || usage
  shift 2
done
case $port in '' | *[!0-9]*) usage ;; esac

if [ -z "$bin" ]; then
  bin=$root/target/release
  [ -x "$bin/dnd-orchestrator" ] || bin=$root/target/debug
fi
[ -x "$bin/dnd-orchestrator" ] || fail "there is no dnd-orchestrator in $bin: run \`make build\` first"
[ -d "$models" ] || fail "$models: no such folder; --models names a folder of models"
models=$(realpath "$models")
mkdir -p "$data"/{run,log,orchestrator,activation}
data=$(realpath "$data")
# A program finds the library beside itself; what the project put in place serves programs that have none there.
if [ ! -e "$bin/libonnxruntime.so" ]; then export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$root/third_party/onnxruntime/lib/libonnxruntime.so}; fi

free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

keepers=()

# Runs a program, and again whenever it was killed or told to end: keep NAME PROGRAM [ARGUMENT...]
keep() {
  local name=$1
  shift
  : >"$data/log/$name.log"
  (
    child=
    trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 0' TERM
    while :; do
      "$@" >>"$data/log/$name.log" 2>&1 &
      child=$!
      echo "$child" >"$data/run/$name.pid"
      code=0
      wait "$child" || code=$?
      if [ "$code" -gt 0 ] && [ "$code" -lt 128 ]; then exit "$code"; fi
      sleep 0.2
    done
  ) &
  keepers+=($!)
}

# Whether what listens on a port says that it is ready.
answers() {
  (
    exec 3<>"/dev/tcp/127.0.0.1/$1"
    printf 'GET /readyz HTTP/1.0\r\n\r\n' >&3
    read -r line <&3
    [[ $line == *" 200 "* ]]
  ) 2>/dev/null
}

as_postgres() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }

# PostgreSQL on loopback, with a password that only this machine's user can read; the first start makes its folder.
start_postgres() {
  pg=$(find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)
  [ -n "$pg" ] || fail "PostgreSQL is missing (Debian: apt install postgresql)"
  local at=$((port + 20)) password=$data/postgres.password
  free "$at" || fail "port $at is taken, and PostgreSQL needs it; --port moves all of them"
  if [ ! -s "$data/postgres/PG_VERSION" ]; then
    (umask 077 && od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$password")
    mkdir -p "$data/postgres"
    if [ "$(id -u)" = 0 ]; then chown postgres "$data/postgres" "$password"; fi
    as_postgres test -w "$data/postgres" || fail "the user postgres can't reach $data/postgres: name another folder with --data"
    as_postgres "$pg/initdb" -D "$data/postgres" --username=dnd --auth=scram-sha-256 --pwfile="$password" >"$data/log/initdb.log"
  fi
  as_postgres "$pg/pg_ctl" -D "$data/postgres" -w -s -l "$data/postgres/log" \
    -o "-p $at -c listen_addresses=127.0.0.1 -c unix_socket_directories=''" start || fail "PostgreSQL did not start: see $data/postgres/log"
  # In the environment, since everyone may read a program's arguments.
  export DND_STORE
  DND_STORE=postgres://dnd:$(cat "$password")@127.0.0.1:$at/dnd
  export PGPASSWORD
  PGPASSWORD=$(cat "$password")
  local ask=(psql -h 127.0.0.1 -p "$at" -U dnd -d postgres -qtA -c)
  [ -n "$("${ask[@]}" "SELECT 1 FROM pg_database WHERE datname = 'dnd'")" ] || "${ask[@]}" "CREATE DATABASE dnd"
  unset PGPASSWORD
}

stop() {
  trap '' INT TERM
  [ ${#keepers[@]} = 0 ] || kill -TERM "${keepers[@]}" 2>/dev/null || true
  for keeper in ${keepers[@]+"${keepers[@]}"}; do wait "$keeper" 2>/dev/null || true; done
  [ -z "${DND_STORE:-}" ] || as_postgres "$pg/pg_ctl" -D "$data/postgres" -m fast -s stop || true
  rm -f "$data"/run/*.pid
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((i = 0; i <= 6; i++)); do
  for taken in $((port + i)) $((port + i + 10)); do
    free "$taken" || fail "port $taken is taken; --port moves all of them"
  done
done
[ -z "$postgres" ] || start_postgres

# Starts a service: its name, how many ports after the first one, and its own arguments. The ports of health and metrics are ten higher.
serve() {
  local name=$1 at=$((port + $2))
  shift 2
  keep "$name" "$bin/dnd-$name" --listen "127.0.0.1:$at" --admin "127.0.0.1:$((at + 10))" "$@"
}

# Whether a service is ready.
ready() { answers $((port + $2 + 10)); }

url=http://127.0.0.1
services=(orchestrator activation captioner summarizer diffusion clip gateway)
serve activation 1 --data "$data/activation"
for i in 2 3 4 5; do serve "${services[i]}" "$i" --model "$models/${services[i]}"; done
serve orchestrator 0 --data "$data/orchestrator" --activation "$url:$((port + 1))" --captioner "$url:$((port + 2))" \
  --summarizer "$url:$((port + 3))" --diffusion "$url:$((port + 4))" --clip "$url:$((port + 5))"
serve gateway 6 --orchestrator "$url:$port"

ended() {
  echo "up: a service has ended with an error; the last lines of the logs in $data/log:" >&2
  for name in "${services[@]}"; do
    if ! kill -0 "$(cat "$data/run/$name.pid")" 2>/dev/null; then tail -n 3 "$data/log/$name.log" | sed "s/^/  $name: /" >&2; fi
  done
  exit 1
}
all_run() { for keeper in "${keepers[@]}"; do kill -0 "$keeper" 2>/dev/null || return 1; done; }

for i in "${!services[@]}"; do
  until ready "${services[i]}" "$i"; do
    all_run || ended
    sleep 0.2
  done
done
echo "the mesh is up at $url:$port"
[ "${#services[@]}" = 6 ] || echo "its pages are at $url:$((port + 6))"
echo "ask it with   dnd dissect --endpoint $url:$port ..."
echo "kept in       $data (log/NAME.log, run/NAME.pid)"
echo "watch it with dnd top$(for i in "${!services[@]}"; do printf ' 127.0.0.1:%s' $((port + i + 10)); done)"
echo "Ctrl-C stops it"
wait -n "${keepers[@]}" || true
ended
