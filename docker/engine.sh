#!/usr/bin/env bash
# Run a command with a Docker engine: engine.sh COMMAND...
# The machine's own where there is one. Else, as root on Debian, a private one that ends with the command: own data, own socket, no bridge, no
# firewall rules, and a substitute base image out of Debian's packages, as no registry has to be reachable. Else: status 75 and the reason.
# Of a private one's data the newest image of each stack and 16 GB of build cache stay, for the next build; DOCKER_WORK says where.
# The command sees ENGINE (what it is, in words), ENGINE_OPTIONS (for docker build and run) and, where it is a substitute, BASE_IMAGE.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: engine.sh COMMAND..." >&2; exit 2; }
cd "$(dirname "$0")/.."
work=${DOCKER_WORK:-/var/tmp/rwkv-docker}
refuse() { echo "no container engine: $*" >&2; exit 75; }

if docker version >/dev/null 2>&1; then
  ENGINE="the machine's own Docker $(docker version --format '{{.Server.Version}}')" ENGINE_OPTIONS="" DOCKER_BUILDKIT=1 exec "$@"
fi
[ "$(id -u)" = 0 ] || refuse "docker is not there or not running, and a private one needs root"
grep -qs '^ID=debian' /etc/os-release || refuse "docker is not there or not running, and a private one is made on Debian alone"

mkdir -p "$work/config"
exec 9>"$work/lock"
flock 9  # one at a time: they share their data
# Building modern's image, the larger, takes 18 GB at its height, cu117's 14.
free=$(df --output=avail --block-size=1G "$work" | tail -n 1)
there=$(du --summarize --block-size=1G "$work" | cut -f 1)
[ $((free + there)) -ge 20 ] || refuse "building an image takes 20 GB in $work, where $((free)) are free: make room, or name another folder by DOCKER_WORK"

packages=()
for tool in dockerd:docker.io docker:docker.io debootstrap:debootstrap; do
  [ -x "/usr/bin/${tool%:*}" ] || [ -x "/usr/sbin/${tool%:*}" ] || packages+=("${tool#*:}")
done
if [ ${#packages[@]} -gt 0 ]; then
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 ||
    refuse "apt-get install ${packages[*]} failed, and docker is not there or not running"
fi

export PATH=/usr/bin:/usr/sbin:$PATH DOCKER_HOST=unix://$work/docker.sock DOCKER_CONFIG=$work/config DOCKER_BUILDKIT=1
# No bridge, so a build reaches the network through the host's; a run that should reach none says --network none.
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
  kill -0 "$engine" 2>/dev/null || refuse "a private one did not start: $(tail -n 3 "$work/dockerd.log")"
  sleep 0.5
done
docker version >/dev/null 2>&1 || refuse "a private one did not answer in a minute: $(tail -n 3 "$work/dockerd.log")"

# The substitute: Debian as debootstrap makes it, the certificates that this machine trusts, and the Python 3.10 it has outside /usr, which
# Debian 12 lacks and Ubuntu 22.04 brings.
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
export BASE_IMAGE=local/rwkv-base:$release
if ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
  root=$work/rootfs
  rm -rf "$root"
  # what a Python that was built elsewhere links to
  libraries=ca-certificates,libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libncursesw6,zlib1g,libuuid1
  debootstrap --variant=minbase --include="$libraries" "$release" "$root" >"$work/debootstrap.log" 2>&1 ||
    refuse "debootstrap failed: $(tail -n 3 "$work/debootstrap.log")"
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
ENGINE="a private Docker $(docker version --format '{{.Server.Version}}') on a substitute base, $BASE_IMAGE from Debian's packages: ubuntu:22.04 itself is not tested"
export ENGINE
"$@" 9>&-
