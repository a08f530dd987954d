#!/bin/bash
# Starts a PostgreSQL server of Debian's package on loopback, in a folder of its own, and prints its URL; or stops it and removes the
# folder. Usage: postgres.sh FOLDER [start|stop]
# Installs the package where there is none. PostgreSQL refuses to run as root: the server is the user nobody's then.
set -eu -o pipefail

folder=$(realpath -m "${1:?usage: postgres.sh FOLDER [start|stop]}")
what=${2:-start}

server() {
    ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1
}
if [ -z "$(server)" ]; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    # The cluster that the package would make in /var/lib is not wanted.
    $as_root mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" | $as_root tee /etc/postgresql-common/createcluster.conf >/dev/null
    "$(dirname "$0")/debian.sh" postgresql >&2
fi
bin=$(server)
run=()
mkdir -p "$folder"
if [ "$(id -u)" = 0 ]; then
    chown nobody "$folder"
    run=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
fi
cd "$folder"

if [ "$what" = stop ]; then
    "${run[@]}" "$bin/pg_ctl" -D "$folder/data" -m fast -w stop >&2
    cd / && rm -rf "$folder"
    exit
fi
if [ ! -d "$folder/data" ]; then
    "${run[@]}" "$bin/initdb" -D "$folder/data" -U dnd -A trust -E UTF8 --locale=C.UTF-8 >"$folder/initdb.log" 2>&1 || { cat "$folder/initdb.log" >&2; exit 1; }
    # A free port, the server's from then on.
    port=$((20000 + RANDOM % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port" >"$folder/port"
fi
port=$(cat "$folder/port")
if ! "${run[@]}" "$bin/pg_ctl" -D "$folder/data" status >/dev/null 2>&1; then
    options="-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=300"
    "${run[@]}" "$bin/pg_ctl" -D "$folder/data" -l "$folder/server.log" -o "$options" -w start >&2 || { cat "$folder/server.log" >&2; exit 1; }
fi
echo "postgres://dnd@127.0.0.1:$port/postgres"
