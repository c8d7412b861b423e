#!/usr/bin/env bash
# Make a virtual environment with the locked stack: venv.sh DIR
# Python 3.10 is $PYTHON, or found on PATH, under pyenv, or through uv, in this order.
set -euo pipefail
dir=${1:?usage: venv.sh DIR}
cd "$(dirname "$0")/.."

is_310() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 10))' >/dev/null 2>&1; }
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.10 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10*/bin/python; do
    if is_310 "$candidate"; then echo "$candidate"; return; fi
    if [ "$candidate" = "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a working Python 3.10 with the venv module." >&2; return 1; fi
  done
  if command -v uv >/dev/null; then
    uv python find --system 3.10 2>/dev/null || { uv python install 3.10 >&2 && uv python find --system 3.10; }
    return
  fi
  cat >&2 <<'EOF'
No Python 3.10 with its venv module found on PATH, under ~/.pyenv or through uv. torch 1.13.1 and DeepSpeed 0.7.0 need it. Any one of these gives you one:
  Ubuntu 22.04:   sudo apt install python3.10 python3.10-venv
  Ubuntu 20.04:   sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.10 python3.10-venv
  pyenv:          pyenv install 3.10
  uv:             pip install uv          (make venv then fetches Python 3.10 through it)
  conda:          make env                (instead of make venv)
or say where it is: make venv PYTHON=/path/to/python3.10
EOF
  return 1
}

python=$(find_python)
echo "venv: Python 3.10 is $python; installing about 3.5 GB into $dir (one to five minutes)"
rm -rf "$dir"
"$python" -m venv "$dir"
docker/install.sh "$dir/bin/python"
