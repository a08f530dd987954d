#!/usr/bin/env bash
# Makes the goldens of the Python references anew and holds the engines against them, the sketch suite's and those of full size; writes docs/parity.md.
# Installs PyTorch, builds models of some gigabytes in target/parity, and takes hours on a small machine.
set -euo pipefail
cd "$(dirname "$0")/.."

export DND_PARITY=${DND_PARITY:-$PWD/target/parity}
python=${PYTHON:-target/parity/venv/bin/python}
if [ ! -x "$python" ]; then
  python3 -m venv target/parity/venv
  "$python" -m pip install --quiet --disable-pip-version-check -r models/requirements.txt -r models/recipes/requirements.txt -r tests/parity/requirements.txt
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps foolbox==3.3.4
fi

for small in tests/parity/pictures.py tests/parity/reference.py tests/parity/*_small.py; do "$python" "$small"; done
cargo test --workspace --locked parity
for large in captions clip diffusion language pictures targets tokenizers; do "$python" "tests/parity/$large.py" "$DND_PARITY/$large"; done
cargo test --workspace --release --locked full_size -- --ignored --nocapture
"$python" tests/parity/table.py "$DND_PARITY"
