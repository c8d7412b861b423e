#!/usr/bin/env bash
# The image's entry point: entrypoint.sh JOB [FLAG...]. JOB is a script (lora state dpo finetune pretrain convert
# inspect merge generate serve evaluate doctor ...), demo, test, shell, or any other command. `lora` without flags runs
# the demo. Checks first, before torch is imported, whether the job can run, and prints what is wrong and
# how to fix it. RWKV_ANYWAY=1: continue despite failed checks. RWKV_DEVICE=cpu: do not require a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
stack=${RWKV_STACK:-cu117}
case $stack in
  cu117) cuda_major=11 ;;
  *) cuda_major=13 ;;
esac

fail() {  # PROBLEM FIX
  echo "error: $1" >&2
  echo "  fix: $2" >&2
  if [ -n "${RWKV_ANYWAY:-}" ]; then
    echo "  continuing, because RWKV_ANYWAY is set" >&2
    return
  fi
  echo "  or continue anyway: -e RWKV_ANYWAY=1" >&2
  exit 78  # EX_CONFIG
}

needs_gpu() { [ "${RWKV_DEVICE:-gpu}" != cpu ] && [[ " $* " != *" --accelerator cpu "* && " $* " != *" --accelerator=cpu "* ]]; }

check_gpu() {
  local gpus driver name capability fix other=modern archs oldest own cuda
  if ! command -v nvidia-smi >/dev/null || ! gpus=$(nvidia-smi --query-gpu=driver_version,name,compute_cap --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
    # an old driver may not know compute_cap
    if ! command -v nvidia-smi >/dev/null || ! gpus=$(nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>/dev/null) || [ -z "$gpus" ]; then
      fail "no GPU is visible in this container" \
        "docker run --gpus all (install the NVIDIA Container Toolkit first); without a GPU -e RWKV_DEVICE=cpu, or with compose COMPOSE_FILE=compose.yaml:compose.cpu.yaml in .env (make compose-env writes it)"
      return 0
    fi
  fi
  archs=$(find rwkv/kernels/lib -name 'rwkv_sm_*.cubin' 2>/dev/null | sed -E 's/.*_sm_([0-9]+)\.cubin/\1/' | sort -n | tr '\n' ' ')
  archs=${archs% }
  drivers "$cuda_major"
  while IFS=, read -r driver name capability; do
    driver=${driver// /} name=${name# } capability=${capability// /}
    if [ "${driver%%.*}" -lt "$oldest" ]; then
      fail "the NVIDIA driver is $driver, but CUDA $cuda in this image needs $oldest or later" "update the driver of the host to $own or later$([ "$stack" = cu117 ] || { drivers 11; echo ", or use the image of the cu117 stack, which needs $oldest"; })"
    elif [ "${driver%%.*}" -lt "$own" ]; then
      echo "warning: the NVIDIA driver is $driver; for CUDA $cuda in this image, $own or later is recommended" >&2
    fi
    [[ "$capability" =~ ^[0-9]+\.[0-9]$ ]] || continue
    if ! has_code "$capability" "$archs"; then
      if [ "$stack" = cu117 ] && [ "${capability%.*}" -lt 6 ]; then
        fix="no stack supports this GPU; pass -e RWKV_DEVICE=cpu to train on the CPU"
      else
        [ "$stack" = cu117 ] || other=cu117
        fix="use the image of the $other stack: make image STACK=$other, and STACK=$other in .env"
      fi
      fail "$name has compute capability $capability, and the $stack stack has kernels only for ${archs:-no GPU}" "$fix"
    fi
  done <<<"$gpus"
}

drivers() {  # CUDA_MAJOR: sets oldest (minimum driver), own (recommended driver) and cuda (the stack's CUDA version)
  local major
  while read -r major oldest own cuda; do [ "$major" != "$1" ] || return 0; done <rwkv/drivers.txt
}

has_code() {  # CAPABILITY ARCHS: a cubin runs on GPUs with the same major and the same or a higher minor version
  local arch
  for arch in $2; do
    if [ $((arch / 10)) = "${1%.*}" ] && [ $((arch % 10)) -le "${1#*.}" ]; then return 0; fi
  done
  return 1
}

check_shm() {
  local mib
  mib=$(($(stat --file-system --format '%b * %S' /dev/shm) / 1048576)) || mib=0
  [ "$mib" -ge 1024 ] || fail "shared memory (/dev/shm) has $mib MiB, and data workers and NCCL need 1024" "docker run --ipc=host, or --shm-size=8g (compose.yaml sets it)"
}

check_writable() {  # FOLDER...
  local folder
  for folder in "$@"; do
    if ! [ -w "$folder" ] || ! (f=$(mktemp "$folder/.writable.XXXXXX") && rm "$f") 2>/dev/null; then
      fail "$folder is not writable by user $(id -u), group $(id -g)" "chown -R $(id -u):$(id -g) the folder mounted at $PWD/$folder, or set UID and GID in .env to its owner (make compose-env writes them)"
    fi
  done
}

export RWKV_CONTAINER=${RWKV_CONTAINER:-docker/entrypoint.sh}  # prefix of printed commands; compose.yaml sets its own
job=${1:-lora}
shift || true
python=${PYTHON:-python}
help_requested() { [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; }
case $job in
  lora | state | dpo | finetune | pretrain | demo)
    if ! help_requested "$@"; then
      if needs_gpu "$@"; then check_gpu; fi
      check_shm
      check_writable out
    fi ;;
  generate | serve | evaluate)
    if ! help_requested "$@" && needs_gpu "$@"; then check_gpu; fi ;;
  convert | merge | export)
    help_requested "$@" || check_writable out ;;
  model)
    help_requested "$@" || check_writable models ;;
esac

case $job in
  demo) PY=$python exec scripts/demo.sh "$@" ;;
  lora) case "$*" in '' | '--version 4' | '--version 7') PY=$python exec scripts/demo.sh "$@" ;; *) exec "$python" scripts/lora.py "$@" ;; esac ;;
  inspect) exec "$python" scripts/inspect_data.py "$@" ;;
  merge) exec "$python" scripts/merge_lora.py "$@" ;;
  serve) exec "$python" scripts/serve.py ${RWKV_HOST:+--host "$RWKV_HOST"} "$@" ;;
  model) exec "$python" scripts/fetch.py "$@" ;;
  test) if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; else exec "$python" -m pytest tests/image; fi ;;
  shell) exec bash "$@" ;;
  *) if [ -f "scripts/$job.py" ]; then exec "$python" "scripts/$job.py" "$@"; else exec "$job" "$@"; fi ;;
esac
