#!/usr/bin/env bash
# Holds the object store against an S3 server on this machine: moto's, installed by pinned version.
set -euo pipefail
cd "$(dirname "$0")/.."
moto=$PWD/third_party/tools/moto
[ -x "$moto/bin/moto_server" ] || { python3 -m venv "$moto" && "$moto/bin/pip" install --quiet --disable-pip-version-check 'moto[server]==5.2.5'; }
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$moto/bin/moto_server" -H 127.0.0.1 -p "$port" > /dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=any AWS_SECRET_ACCESS_KEY=any AWS_REGION=us-east-1
until curl --silent --fail --output /dev/null --request PUT "$AWS_ENDPOINT_URL/dnd"; do kill -0 $server && sleep 0.2; done
DND_TEST_OBJECTS=s3://dnd/blobs cargo test --locked -p dnd-mesh --lib -- --ignored so_they_share_a_bucket
