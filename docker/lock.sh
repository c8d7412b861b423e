#!/usr/bin/env bash
# Lock pyproject.toml into docker/locks/ with hashes: lock.sh UV
# Two files a stack, because DeepSpeed is an sdist that imports torch while it builds and so has to come after torch.
set -euo pipefail
uv=${1:?usage: lock.sh UV}
cd "$(dirname "$0")/.."
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

compile() {  # STACK OPTION...
  "$uv" pip compile --quiet --python-version 3.10 --generate-hashes --no-header --no-annotate --no-emit-index-url \
    pyproject.toml --extra dev --extra "$1" "${@:2}" -o "$new/$1.txt"
}
compile cu117 --python-platform linux
compile modern --universal --fork-strategy fewest  # for every Python; markers say where they differ
# To pip, 2.13.0+cpu is 2.13.0 and better: a wheel of that name in the user's find-links would be taken, and its hash refused. Not with `===`.
sed -i -E 's/^([a-z0-9.-]+)==/\1===/' "$new/modern.txt"

for stack in cu117 modern; do
  for lock in "$stack" "$stack-deepspeed"; do echo "# Made by 'make lock' from pyproject.toml; do not edit." >"docker/locks/$lock.txt"; done
  awk -v lock="docker/locks/$stack" '/^[a-z]/ { to = lock (/^deepspeed=/ ? "-deepspeed.txt" : ".txt") } { print >>to }' "$new/$stack.txt"
done
