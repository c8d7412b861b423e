#!/usr/bin/env bash
# Set up Ubuntu 20.04 or 22.04: packages, a check of the NVIDIA driver, conda. ubuntu-setup.sh [--dry-run] [--no-conda]
# Skips what is already installed. --dry-run prints the commands without running them.
set -euo pipefail
cd "$(dirname "$0")/.."
dry="" conda=yes
for argument; do
  case $argument in
    --dry-run) dry=yes ;;
    --no-conda) conda= ;;
    -h | --help) sed -n '2,3s/^# //p' "$0"; exit 0 ;;
    *) echo "error: $argument is not one of --dry-run, --no-conda, --help" >&2; exit 2 ;;
  esac
done
os=${OS_RELEASE:-/etc/os-release}
# shellcheck source=/dev/null
release=$(. "$os" && echo "${ID:-} ${VERSION_ID:-}")
case $release in
  "ubuntu 20.04" | "ubuntu 22.04") ;;
  *) echo "error: this script is for Ubuntu 20.04 and 22.04, not ${release:-unknown}; elsewhere use make venv or make env" >&2; exit 1 ;;
esac

sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
run_or_print() { if [ -n "$dry" ]; then echo "would run: $*"; else echo "+ $*"; "$@"; fi; }

# haveged provides entropy; ninja and g++ compile the CPU kernels
wanted=(haveged ninja-build python3-pip python-is-python3 g++ make git curl ca-certificates)
[ "$release" = "ubuntu 20.04" ] || wanted+=(python3-venv)  # 20.04 has Python 3.8, which is too old; conda installs 3.10
missing=()
for package in "${wanted[@]}"; do
  [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  run_or_print $sudo apt-get update
  run_or_print $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y "${missing[@]}"
else
  echo "ok: ${wanted[*]}"
fi
if command -v systemctl >/dev/null && [ -d /run/systemd/system ] && ! systemctl is-active --quiet haveged; then
  run_or_print $sudo systemctl enable --now haveged
fi

# The driver is only checked, never installed: choosing one is up to you and may need a reboot.
while read -r major oldest own cuda; do [ "$major" != 11 ] || break; done <rwkv/drivers.txt
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [ -z "$driver" ]; then
  if { command -v lspci >/dev/null && lspci -n 2>/dev/null | grep -qE ' 03[0-9]{2}: 10de:'; } || [ -e /proc/driver/nvidia ]; then
    echo "hint: there is an NVIDIA GPU but no working driver: sudo ubuntu-drivers install (or apt-get install nvidia-driver-535), then reboot"
  else
    echo "ok: no NVIDIA GPU found; training runs on the CPU"
  fi
elif [ "${driver%%.*}" -lt "$own" ]; then
  echo "hint: the NVIDIA driver is $driver, but CUDA $cuda needs $oldest or later ($own recommended): sudo apt-get install nvidia-driver-535, then reboot"
else
  echo "ok: NVIDIA driver $driver"
fi

if [ -n "$conda" ]; then
  found=
  for tool in mamba micromamba conda; do
    if command -v "$tool" >/dev/null; then found=$tool; break; fi
  done
  if [ -n "$found" ]; then
    echo "ok: $found"
  elif [ -x "$HOME/miniforge3/bin/conda" ]; then
    echo "ok: $HOME/miniforge3 (not on PATH: source $HOME/miniforge3/bin/activate)"
  else
    installer=Miniforge3-Linux-$(uname -m).sh
    source=https://github.com/conda-forge/miniforge/releases/latest/download/$installer
    folder=/tmp/miniforge.XXXXXX  # not writable by others
    [ -n "$dry" ] || folder=$(mktemp -d "$folder")
    fetch() { run_or_print curl --proto =https --fail --location --silent --show-error --output "$folder/$1" "$source$2"; }
    fetch "$installer" ""
    fetch sha256 .sha256
    if [ -z "$dry" ] && ! echo "$(cut -d ' ' -f 1 "$folder/sha256")  $folder/$installer" | sha256sum --check --quiet; then
      echo "error: the SHA-256 of $source does not match; nothing was installed, run this again" >&2
      exit 1
    fi
    run_or_print bash "$folder/$installer" -b -p "$HOME/miniforge3"
    run_or_print rm -r "$folder"
    echo "now run: source $HOME/miniforge3/bin/activate"
  fi
fi
echo "next: make env (conda), or make venv (Ubuntu 22.04); then make doctor"
