#!/usr/bin/env bash
# Write .env for compose: who you are, and whether this machine has a GPU. compose_env.sh [STACK]. A .env that is there is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .env ]; then echo ".env is there already; left as it is. Delete it to have it written anew."; exit 0; fi
uid=$(id -u) gid=$(id -g)
if [ "$uid" = 0 ]; then  # the jobs do not run as root, even if you are
  uid=1000 gid=1000
  chown "$uid:$gid" models out
fi
files=compose.yaml
if ! nvidia-smi -L >/dev/null 2>&1; then files=compose.yaml:compose.cpu.yaml; fi
printf '%s\n' "COMPOSE_FILE=$files" "STACK=${1:-cu117}" "UID=$uid" "GID=$gid" >.env
echo ".env is written: COMPOSE_FILE=$files, stack ${1:-cu117}, user $uid:$gid"
