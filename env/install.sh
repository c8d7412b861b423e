#!/usr/bin/env bash
# Install a locked stack and this checkout into a Python: install.sh PYTHON STACK
# DeepSpeed comes last and is built without isolation, because its setup.py imports torch.
set -euo pipefail
python=${1:?usage: install.sh PYTHON STACK}
stack=${2:?usage: install.sh PYTHON STACK}
cd "$(dirname "$0")/.."
export UV_COMPILE_BYTECODE=1  # otherwise processes start slowly if PYTHONDONTWRITEBYTECODE is set or the folder is read-only
quiet=--quiet
if [ -t 1 ]; then quiet=; fi  # show the progress of large downloads on a terminal
install() { env/uv.sh "$python" pip install --python "$python" ${quiet:+"$quiet"} --no-deps --no-build-isolation "$@"; }
install --require-hashes --only-binary :all: -r "env/locks/$stack.txt"
install --require-hashes -r "env/locks/$stack-deepspeed.txt"
install --editable .
env/uv.sh "$python" pip check --python "$python"
