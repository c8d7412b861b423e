#!/usr/bin/env bash
# Lock pyproject.toml into docker/locks/ with hashes: lock.sh UV
# Two files, because DeepSpeed 0.7.0 is an sdist that imports torch while it builds and so has to come after torch.
set -euo pipefail
uv=${1:?usage: lock.sh UV}
cd "$(dirname "$0")/.."
compile() { "$uv" pip compile --quiet --python-version 3.10 --python-platform linux --generate-hashes --no-header --no-annotate --no-emit-index-url "$@"; }
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
compile pyproject.toml --extra dev --no-emit-package deepspeed -o "$new/cu117.txt"
grep -oE 'deepspeed==[0-9.]+' pyproject.toml | head -n 1 | compile - --no-deps -o "$new/cu117-deepspeed.txt"
for lock in cu117 cu117-deepspeed; do
  { echo "# Made by 'make lock' from pyproject.toml; do not edit."; grep -v '^# The following packages were excluded' "$new/$lock.txt" | grep -v '^# deepspeed$'; } >"docker/locks/$lock.txt"
done
