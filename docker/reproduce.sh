#!/usr/bin/env bash
# Build the image of a stack twice, the second time without a cache, and compare: reproduce.sh STACK, under docker/engine.sh
set -euo pipefail
stack=${1:?usage: reproduce.sh STACK}
cd "$(dirname "$0")/.."
outputs=$(mktemp -d)
trap 'rm -rf "$outputs"' EXIT
docker/image.sh "$stack"
docker/contents.sh "rwkv-training:$stack" >"$outputs/first"
NO_CACHE=1 docker/image.sh "$stack"
docker/contents.sh "rwkv-training:$stack" >"$outputs/second"
diff "$outputs/first" "$outputs/second" || { echo "reproduce: the two builds differ" >&2; exit 1; }
echo "reproduce: both builds have the same $(wc -l <"$outputs/first") packages and kernel files; sources $(sed -n 's/^sources //p' "$outputs/first" | cut -c1-12)"
