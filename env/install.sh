#!/usr/bin/env bash
# Install a locked stack and this checkout into a Python: install.sh PYTHON STACK
# The order is DeepSpeed's: its setup.py imports torch, so everything else stands before it and it is built without isolation.
set -euo pipefail
python=${1:?usage: install.sh PYTHON STACK}
stack=${2:?usage: install.sh PYTHON STACK}
cd "$(dirname "$0")/.."
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
quiet=--quiet
if [ -t 1 ]; then quiet=; fi  # gigabytes come down here: show them to whoever waits
pip install ${quiet:+"$quiet"} --require-hashes --no-deps --only-binary :all: -r "env/locks/$stack.txt"
pip install --quiet --require-hashes --no-deps --no-build-isolation -r "env/locks/$stack-deepspeed.txt"
pip install --quiet --no-deps --no-build-isolation --editable .
pip check
