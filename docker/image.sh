#!/usr/bin/env bash
# Build the image of a stack, tag it by its content, and print its size: image.sh STACK, under docker/engine.sh
set -euo pipefail
stack=${1:?usage: image.sh STACK}
cd "$(dirname "$0")/.."
version=$(sed -nE '0,/^version = /s/^version = "(.*)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
arguments=(--build-arg "STACK=$stack" --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
if [ -n "${BASE_IMAGE:-}" ]; then arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE"); fi
if [ -n "${NO_CACHE:-}" ]; then arguments+=(--no-cache); fi
echo "image: the $stack stack with ${ENGINE:-docker}"
started=$SECONDS
# shellcheck disable=SC2086 # may be several options
docker build ${ENGINE_OPTIONS:-} --progress=plain --file docker/Dockerfile "${arguments[@]}" --tag "rwkv-training:$stack" . >"${LOG:=$(mktemp)}" 2>&1 ||
  { tail -n 40 "$LOG" >&2; exit 1; }
for tag in $(docker/tags.sh "rwkv-training:$stack"); do docker tag "rwkv-training:$stack" "rwkv-training:$tag"; done
echo "image: rwkv-training:$stack, $(docker image inspect --format '{{.Size}}' "rwkv-training:$stack" | awk '{printf "%.2f GB", $1 / 1e9}'), $((SECONDS - started)) s; also $(docker/tags.sh "rwkv-training:$stack" | tr '\n' ' ')"
