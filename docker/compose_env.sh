#!/usr/bin/env bash
# Write .env for docker compose: user, stack, and whether there is a GPU. Keeps an existing .env. compose_env.sh [STACK]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .env ]; then echo ".env exists and is unchanged; delete it to write it again"; exit 0; fi
uid=$(id -u) gid=$(id -g)
if [ "$uid" = 0 ]; then  # jobs never run as root
  uid=1000 gid=1000
  chown "$uid:$gid" models out
fi
files=compose.yaml
if ! nvidia-smi -L >/dev/null 2>&1; then files=compose.yaml:compose.cpu.yaml; fi
printf '%s\n' "COMPOSE_FILE=$files" "STACK=${1:-cu117}" "UID=$uid" "GID=$gid" >.env
echo "wrote .env: COMPOSE_FILE=$files, stack ${1:-cu117}, user $uid:$gid"
