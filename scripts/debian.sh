#!/usr/bin/env bash
# Installs those of Debian's packages that are missing, as root or with sudo: `scripts/debian.sh PACKAGE...`
set -euo pipefail
missing=()
for package in "$@"; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
command -v apt-get >/dev/null || { echo "missing, and there is no apt-get to install them with: ${missing[*]}" >&2; exit 1; }
root=$([ "$(id -u)" = 0 ] || echo sudo)
export DEBIAN_FRONTEND=noninteractive
# Another apt may be at work: it is waited for.
$root apt-get update -qq -o DPkg::Lock::Timeout=300
$root apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}" >/dev/null
