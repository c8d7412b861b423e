#!/usr/bin/env bash
# Build the image of a stack and test it from outside and inside: test_image.sh STACK PYTHON COMPOSE, under docker/engine.sh
# COMPOSE is a docker compose v2, used if the engine has none. Arguments after it are passed to pytest.
set -euo pipefail
stack=${1:?usage: test_image.sh STACK PYTHON COMPOSE}
python=${2:?usage: test_image.sh STACK PYTHON COMPOSE}
export COMPOSE=${3:?usage: test_image.sh STACK PYTHON COMPOSE}
cd "$(dirname "$0")/.."
if [ -z "${BUILT:-}" ]; then docker/image.sh "$stack"; fi  # BUILT=1: rwkv-training:STACK exists
RWKV_TEST_IMAGE=rwkv-training:$stack "$python" -m pytest tests/image -rP -W ignore "${@:4}"
echo "test-image: the $stack stack with ${ENGINE:-docker}"
