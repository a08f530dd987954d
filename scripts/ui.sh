#!/usr/bin/env bash
# Tests the pages in Debian's chromium, over a made-up orchestrator and over the whole mesh with the sketch suite. With --screenshots the documentation's
# pictures are made anew, on jobs that are worth showing: that takes some minutes of a core more.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! [ -x "${CHROMIUM:=/usr/bin/chromium}" ]; then
  root=$([ "$(id -u)" = 0 ] || echo sudo)
  $root apt-get update -qq && $root apt-get install -qq -y --no-install-recommends chromium
fi
export CHROMIUM
export ORT_DYLIB_PATH=${ORT_DYLIB_PATH:-$PWD/third_party/onnxruntime/lib/libonnxruntime.so}
if [ "${1:-}" = --screenshots ]; then export SCREENSHOTS=1; fi
(cd tests/ui && npm ci --silent --no-audit --no-fund)
cargo build --locked --workspace --bin dnd --example synthetic
node --test --test-concurrency=1 tests/ui/*.test.mjs
