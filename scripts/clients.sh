#!/usr/bin/env bash
# The clients' code that is made of proto/, by pinned tools: `generate` makes it anew, `check` says whether it is what proto/ says, and `test` tests the clients
# over the whole mesh with the sketch suite. What is missing of Python, npm and Go is installed from Debian.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/third_party/tools/clients
python=$tools/bin/python
typescript=clients/typescript
# Stands for the address that the repository gets: no one else can have it.
go_module=dnd.example/go

install_python() {
  python3 -c 'import ensurepip, venv' 2>/dev/null || scripts/debian.sh python3 python3-venv
  [ -x "$python" ] || python3 -m venv "$tools"
  "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

install_typescript() {
  command -v npm >/dev/null || scripts/debian.sh npm
  # An installation that was broken off, or is another version's, is made anew.
  (cd $typescript && cmp -s package-lock.json node_modules/.installed || { npm ci --silent --no-audit --no-fund --ignore-scripts && cp package-lock.json node_modules/.installed; })
}

# Go's modules are Debian's packages: grpc-go, and both generators.
install_go() {
  scripts/debian.sh golang-go golang-github-golang-protobuf-1-5-dev golang-google-grpc-dev golang-google-genproto-dev protoc-gen-go protoc-gen-go-grpc
}

# Makes all generated code in a folder that is laid out as clients/ is.
generate() {
  install_python grpcio-tools==1.76.0 mypy-protobuf==5.1.0 googleapis-common-protos==1.76.0
  install_typescript
  install_go
  mkdir -p "$1"/{python/src,typescript/src/gen,go}
  local protos common go_packages=Mgoogle/rpc/status.proto=google.golang.org/genproto/googleapis/rpc/status,module=$go_module
  protos=$(cd proto && ls dnd/v1/*.proto)
  for proto in $protos; do go_packages+=,M$proto=$go_module/dndv1; done
  common=$("$python" -c 'import google.rpc; print(google.rpc.__path__[0].removesuffix("/google/rpc"))')
  protoc() { "$python" -m grpc_tools.protoc -I proto -I "$common" "$@" $protos; }
  protoc --plugin="$tools/bin/protoc-gen-mypy" --plugin="$tools/bin/protoc-gen-mypy_grpc" \
    --python_out="$1/python/src" --grpc_python_out="$1/python/src" --mypy_out="quiet:$1/python/src" --mypy_grpc_out="quiet:$1/python/src"
  protoc --plugin=$typescript/node_modules/.bin/protoc-gen-es --es_out="$1/typescript/src/gen" --es_opt=target=ts,import_extension=js \
    google/rpc/status.proto google/rpc/error_details.proto
  protoc --go_out="$go_packages:$1/go" --go-grpc_out="$go_packages:$1/go"
  # Files without a service have nothing for grpc.
  grep -L "class .*Stub" "$1"/python/src/dnd/v1/*_pb2_grpc.py | while read -r file; do rm "$file" "${file}i"; done
}

generate_all() {
  rm -rf clients/python/src/dnd/v1 $typescript/src/gen clients/go/dndv1
  generate clients
}

check() {
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  generate "$work"
  for folder in python/src/dnd/v1 typescript/src/gen go/dndv1; do
    # Which versions Debian's generators have is no matter.
    diff -r -q -x __pycache__ -I '^//[[:space:]]*protoc' "clients/$folder" "$work/$folder" ||
      { echo "clients: clients/$folder is not what proto/ says: run scripts/clients.sh generate" >&2; exit 1; }
  done
}

test_python() {
  install_python mypy==2.4.1 types-grpcio==1.85.0.20261028 types-protobuf==7.35.1.20260906 pandas==3.1.1 pandas-stubs==3.1.0.261029 pillow==13.0.0
  # What is left of an earlier build would be installed, too.
  rm -rf clients/python/build
  install_python './clients/python[notebook,types]'
  (cd clients/python && "$python" -m mypy && "$python" -m unittest discover -s tests)
}

test_typescript() {
  install_typescript
  (cd $typescript && npm run --silent build && npm test --silent)
}

# As a program of the GOPATH that Debian's packages make.
in_go() { (cd "$work/go/src/$go_module" && GO111MODULE=off GOFLAGS= GOPATH=$work/go:/usr/share/gocode go "$@"); }

test_go() {
  install_go
  mkdir -p "$work/go/src/$(dirname $go_module)"
  cp -r clients/go "$work/go/src/$go_module"
  [ -z "$(gofmt -l clients/go)" ] || { echo "clients: run gofmt -w clients/go" >&2; exit 1; }
  in_go vet ./...
  in_go test ./...
  in_go build -o "$work/" ./examples/...
  check_go_modules
}

# Whether go.mod requires each module that is needed, and would do as it stands: a build in module mode, of Debian's code under the modules' names.
check_go_modules() {
  local module=$work/module modules path
  cp -r clients/go "$module"
  # What Debian's grpc needs beside that of go.mod, being older.
  modules="$(awk '/^\t/ { print $1 }' clients/go/go.mod) github.com/golang/protobuf"
  for path in $modules; do
    mkdir -p "$work/modules/$path"
    cp -rL "/usr/share/gocode/src/$path/." "$work/modules/$path"
    printf 'module %s\n\ngo 1.19\n' "$path" >"$work/modules/$path/go.mod"
    (cd "$module" && go mod edit -replace "$path=$work/modules/$path")
  done
  (cd "$module" && go mod edit -require github.com/golang/protobuf@v1.5.2 && GO111MODULE=on GOFLAGS=-mod=readonly GOPROXY=off GOSUMDB=off go build ./...)
}

# Labels three planted units with `dnd` and with each client's example, over the mesh.
test_examples() {
  export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$PWD/third_party/onnxruntime/lib/libonnxruntime.so}
  cargo build --locked --workspace --bin dnd
  local dnd=$PWD/target/debug/dnd suite=$PWD/models/sketch target=$PWD/models/sketch/targets/planted/planted.onnx pictures=$work/pictures
  mkdir "$pictures"
  tar xf "$suite/probing.tar" -C "$pictures" --wildcards '00[0-3]*'
  local endpoint
  start_mesh labels

  "$dnd" dissect --endpoint "$endpoint" --target "$target" --layer colour --units 0,3,5 --images "$pictures" --out "$work/out" >/dev/null
  "$python" -c 'import csv, sys; [print(row["layer"], row["unit"], row["label"], sep="\t") for row in csv.DictReader(open(sys.argv[1]))]' \
    "$work/out/results.csv" >"$work/expected"
  cat "$work/expected"
  local example
  for example in "$python clients/python/examples/dissect.py" "$python clients/python/examples/dissect_async.py" \
    "node $typescript/dist/examples/dissect.js" "$work/dissect"; do
    $example "$endpoint" "$target" "$pictures" colour:0 colour:3 colour:5 >"$work/labels"
    diff "$work/expected" "$work/labels" || { echo "clients: $example says something else than dnd" >&2; exit 1; }
    echo "ok: $example"
  done
  # What Python calls a table is results.csv.
  "$python" - "$endpoint" "$target" "$pictures" "$work/out/results.csv" <<'END'
import sys, dnd, pandas
endpoint, target, pictures, table = sys.argv[1:]
with dnd.Client(endpoint) as client:
    told = client.dissect(target, {"colour": [0, 3, 5]}, pictures).to_dataframe()
pandas.testing.assert_frame_equal(told.fillna(""), pandas.read_csv(table).fillna(""), check_dtype=False)
END
  echo "ok: a table in Python"
  stop_mesh

  # Each uploads to a mesh that has nothing yet, and says what `dnd` says.
  for example in "$python clients/python/examples/upload.py" "node $typescript/dist/examples/upload.js" "$work/upload"; do
    start_mesh "${example##*/}"
    $example "$endpoint" "$target" "$pictures" >"$work/digests"
    "$python" - "$endpoint" "$work/digests" "$work/out/results.csv" "$pictures" <<'END'
import csv, pathlib, sys, dnd
from dnd import requests
from dnd.v1 import picture_pb2, upload_pb2
endpoint, digests, results, pictures = sys.argv[1:]
target, listed = pathlib.Path(digests).read_text().split()
with dnd.Client(endpoint) as client:
    everything = [target, listed, *requests.listed(pictures)[1]]
    assert not client.upload_service.CheckUploads(upload_pb2.CheckUploadsRequest(digests=everything)).missing
    preprocessing = picture_pb2.Preprocessing(height=64, width=64, resampling=picture_pb2.RESAMPLING_BICUBIC, mean=[0, 0, 0], std=[1, 1, 1])
    told = client.dissect(dnd.Target(digest=target, preprocessing=preprocessing), {"colour": [0]}, dnd.ProbingSource(list_digest=listed))
    with open(results) as table:
        assert told["colour", 0].label == next(csv.DictReader(table))["label"], told["colour", 0].label
END
    echo "ok: $example"
    stop_mesh
  done
}

# A mesh with a data folder of its own; gives its `endpoint`.
start_mesh() {
  "$dnd" up --models "$suite" --data "$work/data-$1" --listen 127.0.0.1:0 --port-file "$work/port" 2>"$work/log" &
  mesh=$!
  until [ -s "$work/port" ]; do kill -0 $mesh 2>/dev/null || { cat "$work/log" >&2; exit 1; }; sleep 0.2; done
  endpoint=http://$(cat "$work/port")
}

stop_mesh() {
  [ -z "$mesh" ] || { kill "$mesh"; wait "$mesh"; } || true
  mesh=
  rm -f "$work/port"
}

test_all() {
  work=$(mktemp -d)
  mesh=
  trap 'stop_mesh; rm -rf "$work"' EXIT
  test_python
  test_typescript
  test_go
  test_examples
}

case "${1:-}" in
  generate) generate_all ;;
  check) check ;;
  test) test_all ;;
  *) echo "usage: scripts/clients.sh generate|check|test" >&2; exit 2 ;;
esac
