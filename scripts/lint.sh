#!/usr/bin/env bash
# Checks that no compiler makes: licences and advisories of dependencies (cargo-deny), and the API (buf). Installs both by pinned version.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/third_party/tools

buf() {
  command -v npm >/dev/null || { echo "lint: npm is missing: it fetches buf (Debian: apt install npm)" >&2; exit 1; }
  [ -x "$tools/node_modules/.bin/buf" ] || npm install --silent --no-fund --no-audit --prefix "$tools" @bufbuild/buf@1.75.0
  "$tools/node_modules/.bin/buf" lint proto
}

deny() {
  [ -x "$tools/bin/cargo-deny" ] || cargo install --quiet --locked --root "$tools" cargo-deny@0.20.2
  # Advisories live in a database that is not a package: only what the registry itself has can be checked everywhere.
  "$tools/bin/cargo-deny" check bans licenses sources
}

case "${1:-all}" in
  proto) buf ;;
  all) buf && deny ;;
  *) echo "usage: scripts/lint.sh [proto]" >&2; exit 2 ;;
esac
