#!/usr/bin/env bash
# Lock pyproject.toml into env/locks/ with hashes: lock.sh UV
# Locked versions are kept unless a pin requires another; UPGRADE=1 upgrades everything that is not pinned.
# Each stack has two files, because DeepSpeed is an sdist that imports torch while building and must be
# installed after it. The tools have one file. lm-eval and ray have one per stack, with the packages that the stack lacks.
set -euo pipefail
uv=${1:?usage: lock.sh UV}
cd "$(dirname "$0")/.."
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

compile() {  # LOCK OPTION...
  if [ -z "${UPGRADE:-}" ]; then cat env/locks/"$1"{,-deepspeed}.txt 2>/dev/null | sed -E 's/^([a-z0-9.-]+)===/\1==/' >"$new/$1.txt" || true; fi
  "$uv" pip compile --quiet --python-version 3.10 --generate-hashes --no-header --annotation-style split --no-emit-index-url "${@:2}" -o "$new/$1.txt"
}
compile cu117 pyproject.toml --extra dev --extra cu117 --python-platform linux
compile modern pyproject.toml --extra dev --extra modern --universal --fork-strategy fewest  # for every Python, with markers
for stack in cu117 modern; do  # the stack's versions; fsspec may be an older one, because datasets limits it
  sed -nE 's/^([a-z0-9.-]+==[^\]*[^ \]) ?\\?$/\1/p' "$new/$stack.txt" | grep -v '^fsspec==' >"$new/$stack.pins"
  if [ $stack = cu117 ]; then options=(--python-platform linux); else options=(--universal --fork-strategy fewest); fi
  for extra in lm-eval ray; do
    grep -oE "\"$extra==[0-9.]+" pyproject.toml | tr -d '"' | compile "$extra-$stack" - --constraint "$new/$stack.pins" "${options[@]}"
  done
done
compile tools --group tools --universal --fork-strategy fewest
# `===`: with `==` pip would prefer a 2.13.0+cpu wheel in the user's find-links over 2.13.0, and then reject its hash.
sed -i -E 's/^([a-z0-9.-]+)==/\1===/' "$new/modern.txt"

for lock in cu117 cu117-deepspeed modern modern-deepspeed {lm-eval,ray}-{cu117,modern} tools uv; do echo "# Made by 'make lock' from pyproject.toml; do not edit." >"env/locks/$lock.txt"; done
for stack in cu117 modern; do
  awk -v lock="env/locks/$stack" '/^[a-z]/ { to = lock (/^deepspeed=/ ? "-deepspeed.txt" : ".txt") } to { print >>to }' "$new/$stack.txt"
done
for lock in {lm-eval,ray}-{cu117,modern}; do  # only what is not in the stack, on every platform
  awk '{ line = $0; sub(/ \\$/, "", line) } NR == FNR { known[line]; next } /^[a-z]/ { on = !($1 in known || line in known) } on' "$new/${lock##*-}.pins" "$new/$lock.txt" |
    grep -v -- "-c $new" >>"env/locks/$lock.txt"  # a temporary file of this script
done
awk '/^[a-z]/ { on = 1 } on' "$new/tools.txt" >>env/locks/tools.txt
awk '/^[a-z]/ { on = /^uv==/ } on' "$new/cu117.txt" >>env/locks/uv.txt  # for env/uv.sh
