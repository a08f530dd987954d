#!/usr/bin/env bash
# Checks that no compiler makes: licences and advisories of dependencies (cargo-deny), the API (buf), and the code of the clients that is made of it. Installs
# what it needs by pinned version. A release keeps its API with `scripts/lint.sh release`: nothing that it has may be taken away from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/third_party/tools

buf=$tools/node_modules/.bin/buf
released=proto/released.binpb

install_buf() {
  source scripts/node.sh
  [ -x "$buf" ] || npm install --silent --no-fund --no-audit --prefix "$tools" @bufbuild/buf@1.75.0
}

api() {
  install_buf
  "$buf" lint proto
  "$buf" breaking proto --against $released
}

release() {
  install_buf
  "$buf" build proto --exclude-source-info --output $released
}

deny() {
  [ -x "$tools/bin/cargo-deny" ] || cargo install --quiet --locked --root "$tools" cargo-deny@0.20.2
  # Advisories live in a database that is not a package: only what the registry itself has can be checked everywhere.
  "$tools/bin/cargo-deny" check bans licenses sources
}

case "${1:-all}" in
  proto) api ;;
  release) release ;;
  all) api; scripts/clients.sh check; deny ;;
  *) echo "usage: scripts/lint.sh [proto|release]" >&2; exit 2 ;;
esac
