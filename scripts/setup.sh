#!/usr/bin/env bash
# Puts in place what the project needs and a package registry has: ONNX Runtime's library, by pinned version and hash.
set -euo pipefail
cd "$(dirname "$0")/.."

version=1.31.1
sha256=fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3
library=third_party/onnxruntime/lib/libonnxruntime.so

missing() { echo "setup: $1" >&2; exit 1; }
command -v cargo >/dev/null || missing "cargo is missing: install a Rust toolchain (rustup.rs)"
command -v cc >/dev/null || missing "cc is missing: install a C compiler (Debian: apt install gcc)"

if [ -n "${ORT_DYLIB_PATH:-}" ] && [ "$(realpath -m "$ORT_DYLIB_PATH")" != "$(realpath -m "$library")" ]; then
  [ -f "$ORT_DYLIB_PATH" ] || missing "ORT_DYLIB_PATH is $ORT_DYLIB_PATH, and no such file is there"
  exit 0  # one's own
fi
right() { echo "$sha256  $library" | sha256sum --check --status 2>/dev/null; }
if right; then exit 0; fi

[ "$(uname -sm)" = "Linux x86_64" ] || missing "ONNX Runtime is fetched for Linux on x86_64 only; here, set ORT_DYLIB_PATH to a libonnxruntime.so of version $version"
command -v python3 >/dev/null || missing "python3 is missing: it fetches ONNX Runtime (Debian: apt install python3 python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || missing "pip is missing: it fetches ONNX Runtime (Debian: apt install python3-pip)"

echo "setup: fetching ONNX Runtime $version"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The options make the wheel independent of this machine's Python.
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \
  --python-version 3.11 --implementation cp --require-hashes -r scripts/onnxruntime.txt -d "$work" ||
  missing "onnxruntime $version could not be fetched from the Python package index (is there a network?)"
mkdir -p "$(dirname "$library")"
python3 - "$work"/*.whl "onnxruntime/capi/libonnxruntime.so.$version" "$library.part" <<'PY'
import sys, zipfile
wheel, inside, target = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, open(target, "wb") as out:
    out.write(archive.read(inside))
PY
mv "$library.part" "$library"
right || missing "$library has the wrong hash"
