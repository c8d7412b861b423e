#!/usr/bin/env bash
# What two builds of an image must have in common, as text to compare: contents.sh IMAGE
# Every package of the distribution and of Python by version, and the SHA-256 of our kernels' sources and of each compiled file.
set -euo pipefail
image=${1:?usage: contents.sh IMAGE}
docker run --rm --network none --entrypoint bash "$image" -c '
  dpkg-query --show | sort
  python -m pip --disable-pip-version-check list --format freeze | sort
  python -c "from rwkv.kernels import build; print(\"sources\", build.manifest()[\"source_hash\"])"
  cd rwkv/kernels/lib && sha256sum */*.cubin */*.ptx */*.so'
