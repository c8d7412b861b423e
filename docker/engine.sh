#!/usr/bin/env bash
# Run a command with a Docker engine: engine.sh COMMAND...
# Uses the machine's Docker if there is one. Otherwise, as root on Debian, starts a private dockerd that
# stops with the command: separate data and socket, no bridge, no firewall rules, and a substitute base
# image built from Debian packages, so that no registry is needed. Otherwise exits with 75 and the reason.
# Keeps the newest image of each stack and 16 GB of build cache in DOCKER_WORK for the next build.
# Sets for the command: ENGINE (a description), ENGINE_OPTIONS (for docker build and run), and BASE_IMAGE
# if substituted.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: engine.sh COMMAND..." >&2; exit 2; }
cd "$(dirname "$0")/.."
work=${DOCKER_WORK:-/var/tmp/rwkv-docker}
fail() { echo "no container engine: $*" >&2; exit 75; }

if docker version >/dev/null 2>&1; then
  ENGINE="the machine's Docker $(docker version --format '{{.Server.Version}}')" ENGINE_OPTIONS="" DOCKER_BUILDKIT=1 exec "$@"
fi
[ "$(id -u)" = 0 ] || fail "docker is not installed or not running, and starting a private engine needs root"
grep -qs '^ID=debian' /etc/os-release || fail "docker is not installed or not running, and starting a private engine needs Debian"

mkdir -p "$work/config"
exec 9>"$work/lock"
flock 9  # one engine at a time: they share the data folder
# Building the modern image needs 18 GB at its peak, cu117's 14.
free=$(df --output=avail --block-size=1G "$work" | tail -n 1)
used=$(du --summarize --block-size=1G "$work" | cut -f 1)
[ $((free + used)) -ge 20 ] || fail "building an image needs 20 GB in $work, and $((free)) GB are free; free some space, or set DOCKER_WORK to another folder"

packages=()
for tool in dockerd:docker.io docker:docker.io debootstrap:debootstrap; do
  [ -x "/usr/bin/${tool%:*}" ] || [ -x "/usr/sbin/${tool%:*}" ] || packages+=("${tool#*:}")
done
if [ ${#packages[@]} -gt 0 ]; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 ||
    fail "apt-get install ${packages[*]} failed, and docker is not installed or not running"
fi

export PATH=/usr/bin:/usr/sbin:$PATH DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config DOCKER_BUILDKIT=1
# There is no bridge, so builds use the host's network; pass --network none to run without network.
export ENGINE_OPTIONS="--network=host"
dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/docker.pid" --host "$DOCKER_HOST" --storage-driver=overlay2 \
  --bridge=none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false >"$work/dockerd.log" 2>&1 9>&- &
engine=$!
trim() {
  local kept
  kept=$(docker images --no-trunc --quiet --filter 'reference=rwkv-training:cu117' --filter 'reference=rwkv-training:modern' --filter "reference=${BASE_IMAGE:-none}")
  docker images --no-trunc --quiet | sort -u | grep -vxF "$kept" | xargs --no-run-if-empty docker rmi --force
  docker builder prune --force --keep-storage 16GB
  docker volume prune --force
}
stop() {
  trim >/dev/null 2>&1 || true
  kill "$engine" 2>/dev/null || true
  wait "$engine" 2>/dev/null || true
  umount "$work/exec/netns/default" 2>/dev/null || true
}
trap stop EXIT
for _ in $(seq 120); do
  docker version >/dev/null 2>&1 && break
  kill -0 "$engine" 2>/dev/null || fail "a private dockerd did not start: $(tail -n 3 "$work/dockerd.log")"
  sleep 0.5
done
docker version >/dev/null 2>&1 || fail "a private dockerd did not answer within a minute: $(tail -n 3 "$work/dockerd.log")"

# The substitute base: Debian by debootstrap, this machine's certificates, and its Python 3.10 outside
# /usr (Debian 12 has none, unlike Ubuntu 22.04).
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
export BASE_IMAGE=local/rwkv-base:$release
if ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
  root=$work/rootfs
  rm -rf "$root"
  # libraries that this Python links to
  libraries=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libncursesw6,zlib1g,libuuid1
  debootstrap --variant=minbase --include="$libraries" "$release" "$root" >"$work/debootstrap.log" 2>&1 ||
    fail "debootstrap failed: $(tail -n 3 "$work/debootstrap.log")"
  cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
  chroot "$root" update-ca-certificates >/dev/null 2>&1
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
  for python in .venv/bin/python python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10*/bin/python; do
    prefix=$("$python" -c 'import sys; print(sys.base_prefix if sys.version_info[:2] == (3, 10) else "/usr")' 2>/dev/null || true)
    [ -n "$prefix" ] && [ "$prefix" != /usr ] || continue
    mkdir -p "$root/usr/local"
    tar -C "$prefix" --exclude=__pycache__ --exclude=test --exclude='*.a' --exclude=site-packages -c bin include lib | tar -C "$root/usr/local" -x
    mkdir -p "$root/usr/local/lib/python3.10/site-packages"
    chroot "$root" ldconfig
    break
  done
  tar -C "$root" -c . | docker import --change 'CMD ["/bin/bash"]' - "$BASE_IMAGE" >/dev/null
  rm -rf "$root"
fi
ENGINE="a private Docker $(docker version --format '{{.Server.Version}}') on a substitute base, $BASE_IMAGE from Debian packages; ubuntu:22.04 is not tested"
export ENGINE
"$@" 9>&-
