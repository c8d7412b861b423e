#!/usr/bin/env bash
# List what two builds of an image must have in common: contents.sh IMAGE
# Versions of all system and Python packages, the hash of the kernel sources, SHA-256 of compiled files.
set -euo pipefail
image=${1:?usage: contents.sh IMAGE}
docker run --rm --network none --entrypoint bash "$image" -c '
  dpkg-query --show | sort
  python -m pip --disable-pip-version-check list --format freeze | sort
  python -c "from rwkv.kernels import build; print(\"sources\", build.manifest()[\"source_hash\"])"
  cd rwkv/kernels/lib && sha256sum */*.cubin */*.ptx */*.so'
