#!/usr/bin/env bash
# Install the locked environment and this checkout into a Python: install.sh PYTHON
# The order is DeepSpeed 0.7.0's: its setup.py imports torch, so everything else stands before it and it is built without isolation.
set -euo pipefail
python=${1:?usage: install.sh PYTHON}
cd "$(dirname "$0")/.."
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
quiet=--quiet
if [ -t 1 ]; then quiet=; fi  # two gigabytes come down here: show them to whoever waits
pip install ${quiet:+"$quiet"} --require-hashes --no-deps --only-binary :all: -r docker/locks/cu117.txt
pip install --quiet --require-hashes --no-deps --no-build-isolation -r docker/locks/cu117-deepspeed.txt
pip install --quiet --no-deps --no-build-isolation --editable .
pip check
