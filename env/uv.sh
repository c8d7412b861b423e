#!/usr/bin/env bash
# Run the locked uv inside a Python, with the index and certificate that pip is configured for: uv.sh PYTHON ARGUMENT...
# Installs uv with pip first if it is missing. uv itself reads neither pip.conf nor PIP_INDEX_URL.
set -euo pipefail
python=${1:?usage: uv.sh PYTHON ARGUMENT...}
lock=$(dirname "$0")/locks/uv.txt
version=$(sed -nE 's/^uv==([0-9.]+).*/\1/p' "$lock")
if ! "$python" -m uv --version 2>/dev/null | grep -qF "uv $version "; then
  "$python" -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps --only-binary :all: -r "$lock"
fi
settings=$("$python" -m pip config list)
setting() { sed -nE "s/^(global|install|:env:)\.$1='(.*)'$/\2/p" <<<"$settings" | head -n 1; }
index=$(setting index-url)
certificate=$(setting cert)
if [ -n "$index" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}; fi
if [ -n "$certificate" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$certificate}; fi
exec "$python" -m uv "${@:2}"
