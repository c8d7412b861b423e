#!/usr/bin/env bash
# Create or update the conda environment `rwkv` with mamba, micromamba or conda, whichever is installed; then compile the kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in ${CONDA:-mamba micromamba conda}; do
  if command -v "$tool" >/dev/null; then break; fi
  tool=
done
if [ -z "${tool:-}" ]; then
  echo "error: no mamba, micromamba or conda on PATH" >&2
  echo "  fix: run scripts/ubuntu-setup.sh (Ubuntu) to install Miniforge, pass CONDA=/path/to/conda, or use make venv, which needs no conda" >&2
  exit 1
fi
run=("$tool" run --name rwkv)
if [ "$(basename "$tool")" = micromamba ]; then  # it cannot update a missing environment, and asks for confirmation
  existing=$("$tool" env list --json | grep -cE '/rwkv"' || true)
  "$tool" "$([ "$existing" -gt 0 ] && echo update || echo create)" --yes --name rwkv --file environment.yml
else
  "$tool" env update --name rwkv --file environment.yml
  run=("$tool" run --no-capture-output --name rwkv)
fi
"${run[@]}" env/install.sh python cu117
"${run[@]}" python -c 'from rwkv.kernels import build; build.main()'
echo "next: $(basename "$tool") activate rwkv, then the scripts: python scripts/lora.py --help"
