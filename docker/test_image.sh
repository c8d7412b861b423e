#!/usr/bin/env bash
# Build the image of a stack and test it from outside and inside: test_image.sh STACK PYTHON COMPOSE, under docker/engine.sh
# COMPOSE is a docker compose v2 to fall back on where the engine has none. A substitute base stays named in the output.
set -euo pipefail
stack=${1:?usage: test_image.sh STACK PYTHON COMPOSE}
python=${2:?usage: test_image.sh STACK PYTHON COMPOSE}
export COMPOSE=${3:?usage: test_image.sh STACK PYTHON COMPOSE}
cd "$(dirname "$0")/.."
if [ -z "${BUILT:-}" ]; then docker/image.sh "$stack"; fi  # BUILT=1: rwkv-training:STACK is there
RWKV_TEST_IMAGE=rwkv-training:$stack "$python" -m pytest tests/image -rP -W ignore "${@:4}"
echo "test-image: the stack $stack with ${ENGINE:-docker}"
