#!/usr/bin/env bash
# Create a virtual environment with a locked stack: venv.sh DIR STACK
# Python is $PYTHON or the first suitable one on PATH or under pyenv; if there is none, uv downloads it.
set -euo pipefail
dir=${1:?usage: venv.sh DIR STACK}
stack=${2:?usage: venv.sh DIR STACK}
cd "$(dirname "$0")/.."
case $stack in
  cu117) versions=(3.10) wanted="Python 3.10" size=3.9 need=6 ;;
  modern) versions=(3.12 3.13 3.11 3.10) wanted="Python 3.10 to 3.13" size=5.4 need=9 ;;
  *) echo "STACK=$stack is not one of cu117, modern." >&2; exit 1 ;;
esac

has_venv() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; }
is_suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${versions[@]}" >/dev/null 2>&1; }

uv() {  # from PATH, or the locked version in .venv-uv
  local candidate
  if type -P uv >/dev/null; then command uv "$@"; return; fi
  if [ ! -x .venv-uv/bin/python ]; then
    for candidate in python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3*/bin/python; do
      if has_venv "$candidate"; then "$candidate" -m venv .venv-uv; break; fi
    done
  fi
  [ -x .venv-uv/bin/python ] && env/uv.sh .venv-uv/bin/python "$@"
}

find_python() {
  local candidate version root=${PYENV_ROOT:-$HOME/.pyenv}/versions candidates=(${PYTHON:+"$PYTHON"} "${versions[@]/#/python}" python3 python)
  for version in "${versions[@]}"; do candidates+=("$root/$version"*/bin/python); done
  for candidate in "${candidates[@]}"; do
    if is_suitable "$candidate"; then echo "$candidate"; return; fi
    if [ "$candidate" = "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a working $wanted with the venv module." >&2; return 1; fi
  done
  uv python find --system "${versions[0]}" 2>/dev/null && return
  uv python install "${versions[0]}" >&2 && uv python find --system "${versions[0]}" && return
  cat >&2 <<EOF
The $stack stack needs $wanted with the venv module; none was found on PATH or under ~/.pyenv, and uv could not download one. To install it:
  Ubuntu 22.04:   sudo apt install python3.10 python3.10-venv
  Ubuntu 20.04:   sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.10 python3.10-venv
  pyenv:          pyenv install ${versions[0]}
  uv:             pip install uv          (make venv then downloads Python ${versions[0]} with it)
  conda:          make env                (instead of make venv; the cu117 stack)
or pass its path: make venv PYTHON=/path/to/python${versions[0]} STACK=$stack
EOF
  return 1
}

python=$(find_python)
# During the installation, both the downloads and the installed files are on disk. Without df, skip the check.
{ read -r _ && read -r _ _ _ free _; } < <(df -Pk "$(dirname "$dir")" 2>/dev/null) || free=
if [ -n "$free" ]; then
  if [ -e "$dir" ]; then free=$((free + $(du -sk "$dir" | cut -f 1))); fi
  if [ $((free >> 20)) -lt "$need" ]; then
    echo "Not enough disk space: the $stack stack needs $need GB while it installs into $dir ($size GB afterwards); $((free >> 20)) GB are free." >&2; exit 1
  fi
fi
echo "venv: the $stack stack on $python; installing about $size GB into $dir"
rm -rf "$dir"
"$python" -m venv "$dir"
env/install.sh "$dir/bin/python" "$stack"
