#!/usr/bin/env bash
# Checks k8s/ and deploy/ without a cluster: builds every overlay, holds it against Kubernetes' schemas, and runs the tests of both folders. It wants the
# programs that `cargo build` made, and installs what else it needs by pinned version. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/third_party/k8s

missing() { echo "k8s: $1" >&2; exit 1; }
[ -x target/debug/dnd ] || missing "the programs are not built: run \`cargo build --workspace --bins\` first"

pip() { python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location --root-user-action=ignore --only-binary=:all: "$@"; }
want=$(cat k8s/tests/*.txt k8s/tests/package.json | sha256sum)
if [ ! -f "$tools/made" ] || [ "$(cat "$tools/made")" != "$want" ]; then
  echo "k8s: fetching what checks manifests"
  rm -rf "$tools"
  mkdir -p "$tools"
  pip --target "$tools/python" -r k8s/tests/requirements.txt
  echo "$want" >"$tools/made"
fi

# The types of custom resources; where npm is missing those go unchecked, and the test says so.
if [ ! -x "$tools/node_modules/.bin/tsc" ] && command -v npm >/dev/null; then
  cp k8s/tests/package.json "$tools"
  npm install --silent --no-fund --no-audit --prefix "$tools"
fi

# A kubectl with version 5 of kustomize is taken as it is. Debian's is older; the same program comes in a package that is published for another purpose.
if ! kubectl version --client 2>/dev/null | grep -q 'Kustomize Version: v5'; then
  if [ ! -x "$tools/bin/kubectl" ]; then
    echo "k8s: fetching kubectl"
    pip --no-deps --require-hashes --target "$tools/layer" -r k8s/tests/kubectl.txt
    python3 - "$tools" <<'PY'
import io, pathlib, sys, tarfile, zipfile
tools = pathlib.Path(sys.argv[1])
archive = tarfile.open(next(tools.glob("layer/aws_cdk/*/_jsii/*.tgz")))
layer = zipfile.ZipFile(io.BytesIO(archive.extractfile("package/lib/layer.zip").read()))
kubectl = tools / "bin/kubectl"
kubectl.parent.mkdir(exist_ok=True)
kubectl.write_bytes(layer.read("kubectl/kubectl"))
kubectl.chmod(0o755)
PY
    rm -rf "$tools/layer"
  fi
  export PATH=$tools/bin:$PATH
fi
export PYTHONPATH=$tools/python PYTHONDONTWRITEBYTECODE=1
[ $# -gt 0 ] || set -- k8s/tests deploy/tests
exec python3 -m pytest -q -p no:cacheprovider "$@"
