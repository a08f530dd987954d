#!/usr/bin/env bash
# Makes the real network and fetches the photographs that tests/tests/photographs.rs looks at, once, out of Python packages.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=third_party/photographs
made=$folder/made
want=$(cat tests/photographs/* | sha256sum)
if [ -f "$made" ] && [ "$(cat "$made")" = "$want" ]; then exit 0; fi

echo "setup: making a real network for the tests out of Python packages"
python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location --only-binary=:all: --upgrade --target "$folder/python" -r tests/photographs/requirements.txt
python3 -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --upgrade --target "$folder/python" foolbox==3.3.4
PYTHONPATH=$folder/python python3 tests/photographs/make.py "$folder"
echo "$want" >"$made"
