#!/usr/bin/env bash
# Tests the pages in Debian's chromium, over a made-up orchestrator and over the whole mesh with the sketch suite. With --screenshots the documentation's
# pictures are made anew, on jobs that are worth showing: that takes some minutes of a core more. What is missing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/node.sh

export CHROMIUM=${CHROMIUM:-/usr/bin/chromium}
[ -x "$CHROMIUM" ] || scripts/debian.sh chromium
export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$PWD/third_party/onnxruntime/lib/libonnxruntime.so}
if [ "${1:-}" = --screenshots ]; then export SCREENSHOTS=1; fi
npm_packages tests/ui
cargo build --locked --workspace --bin dnd --example synthetic
node --test --test-concurrency=1 tests/ui/*.test.mjs
