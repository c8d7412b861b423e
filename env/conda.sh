#!/usr/bin/env bash
# Make the conda environment `rwkv`, or bring it up to date, with mamba, micromamba or conda, whichever is there; then the kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in ${CONDA:-mamba micromamba conda}; do
  if command -v "$tool" >/dev/null; then break; fi
  tool=
done
if [ -z "${tool:-}" ]; then
  echo "error: no mamba, micromamba or conda on PATH" >&2
  echo "  mend: scripts/ubuntu-setup.sh installs conda (Miniforge) on Ubuntu; CONDA=/path/to/it says where one is; make venv needs none" >&2
  exit 1
fi
run=("$tool" run --name rwkv)
if [ "$(basename "$tool")" = micromamba ]; then  # it updates only what exists, and asks
  there=$("$tool" env list --json | grep -cE '/rwkv"' || true)
  "$tool" "$([ "$there" -gt 0 ] && echo update || echo create)" --yes --name rwkv --file environment.yml
else
  "$tool" env update --name rwkv --file environment.yml
  run=("$tool" run --no-capture-output --name rwkv)
fi
"${run[@]}" env/install.sh python cu117
"${run[@]}" python -c 'from rwkv.kernels import build; build.main()'
echo "Now: $(basename "$tool") activate rwkv, then the scripts: python scripts/lora.py --help"
