#!/usr/bin/env bash
# Make a virtual environment with a locked stack: venv.sh DIR STACK
# Its Python is $PYTHON, or found on PATH, under pyenv, or through uv, in this order.
set -euo pipefail
dir=${1:?usage: venv.sh DIR STACK}
stack=${2:?usage: venv.sh DIR STACK}
cd "$(dirname "$0")/.."
case $stack in
  cu117) versions=(3.10) wanted="Python 3.10" size=3.9 need=6 ;;
  modern) versions=(3.12 3.13 3.11 3.10) wanted="Python 3.10 to 3.13" size=5.4 need=9 ;;
  *) echo "STACK=$stack is not one of cu117, modern." >&2; exit 1 ;;
esac

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${versions[@]}" >/dev/null 2>&1; }
find_python() {
  local candidate root=${PYENV_ROOT:-$HOME/.pyenv}/versions candidates=(${PYTHON:+"$PYTHON"} "${versions[@]/#/python}" python3 python)
  for version in "${versions[@]}"; do candidates+=("$root/$version"*/bin/python); done
  for candidate in "${candidates[@]}"; do
    if fits "$candidate"; then echo "$candidate"; return; fi
    if [ "$candidate" = "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON is not a working $wanted with the venv module." >&2; return 1; fi
  done
  if command -v uv >/dev/null; then
    uv python find --system "${versions[0]}" 2>/dev/null || { uv python install "${versions[0]}" >&2 && uv python find --system "${versions[0]}"; }
    return
  fi
  cat >&2 <<EOF
No $wanted with its venv module found on PATH, under ~/.pyenv or through uv. The $stack stack needs it. Any one of these gives you one:
  Ubuntu 22.04:   sudo apt install python3.10 python3.10-venv
  Ubuntu 20.04:   sudo add-apt-repository ppa:deadsnakes/ppa && sudo apt install python3.10 python3.10-venv
  pyenv:          pyenv install ${versions[0]}
  uv:             pip install uv          (make venv then fetches Python ${versions[0]} through it)
  conda:          make env                (instead of make venv; the cu117 stack)
or say where it is: make venv PYTHON=/path/to/python${versions[0]} STACK=$stack
EOF
  return 1
}

python=$(find_python)
# What is downloaded stays beside what is installed until the end. Where df is not there nobody can tell, and nothing is refused.
{ read -r _ && read -r _ _ _ free _; } < <(df -Pk "$(dirname "$dir")" 2>/dev/null) || free=
if [ -n "$free" ]; then
  if [ -e "$dir" ]; then free=$((free + $(du -sk "$dir" | cut -f 1))); fi
  if [ $((free >> 20)) -lt "$need" ]; then
    echo "The $stack stack takes $size GB in $dir, $need GB with what is downloaded until it is installed; there is room for $((free >> 20)) GB." >&2; exit 1
  fi
fi
echo "venv: the $stack stack on $python; installing about $size GB into $dir (one to five minutes)"
rm -rf "$dir"
"$python" -m venv "$dir"
env/install.sh "$dir/bin/python" "$stack"
