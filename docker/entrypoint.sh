#!/usr/bin/env bash
# The image's entry point: entrypoint.sh JOB [FLAG...], where JOB is a script's name (lora finetune pretrain convert inspect merge generate
# doctor), demo, test, shell, or any other command. `lora` without flags is the embedded default.
# A job that cannot run as asked is refused here, before torch is imported: a line with what is wrong and one with how to mend it.
# RWKV_ANYWAY=1 goes on all the same. RWKV_DEVICE=cpu asks for no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
stack=${RWKV_STACK:-cu117}
case $stack in
  cu117) cuda_major=11 ;;
  *) cuda_major=13 ;;
esac

refuse() {  # WHAT MEND
  echo "error: $1" >&2
  echo "  mend: $2" >&2
  if [ -n "${RWKV_ANYWAY:-}" ]; then
    echo "  going on, as RWKV_ANYWAY is set" >&2
    return
  fi
  echo "  or go on all the same: -e RWKV_ANYWAY=1" >&2
  exit 78  # EX_CONFIG
}

gpu_is_wanted() { [ "${RWKV_DEVICE:-gpu}" != cpu ] && [[ " $* " != *" --accelerator cpu "* && " $* " != *" --accelerator=cpu "* ]]; }

check_gpu() {
  local seen driver name capability mend other=modern archs oldest own cuda
  if ! command -v nvidia-smi >/dev/null || ! seen=$(nvidia-smi --query-gpu=driver_version,name,compute_cap --format=csv,noheader 2>/dev/null) || [ -z "$seen" ]; then
    # a driver too old to know compute_cap still tells its version
    if ! command -v nvidia-smi >/dev/null || ! seen=$(nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>/dev/null) || [ -z "$seen" ]; then
      refuse "no GPU is visible in this container" \
        "docker run --gpus all (install the NVIDIA container toolkit first); on a machine without one -e RWKV_DEVICE=cpu, or for compose COMPOSE_FILE=compose.yaml:compose.cpu.yaml in .env (make compose-env writes it)"
      return 0
    fi
  fi
  archs=$(find rwkv/kernels/lib -name 'rwkv_sm_*.cubin' 2>/dev/null | sed -E 's/.*_sm_([0-9]+)\.cubin/\1/' | sort -n | tr '\n' ' ')
  drivers "$cuda_major"
  while IFS=, read -r driver name capability; do
    driver=${driver// /} name=${name# } capability=${capability// /}
    if [ "${driver%%.*}" -lt "$oldest" ]; then
      refuse "the NVIDIA driver is $driver, and CUDA $cuda in this image needs $oldest at least" "update the driver of the host to $own or later$([ "$stack" = cu117 ] || { drivers 11; echo ", or use the image of the stack cu117, which needs $oldest"; })"
    elif [ "${driver%%.*}" -lt "$own" ]; then
      echo "warning: the NVIDIA driver is $driver, and CUDA $cuda in this image came with $own: it runs, but update the driver of the host if you can" >&2
    fi
    [[ "$capability" =~ ^[0-9]+\.[0-9]$ ]] || continue
    if ! has_code "$capability" "$archs"; then
      if [ "$stack" = cu117 ] && [ "${capability%.*}" -lt 6 ]; then
        mend="no stack has code for it; -e RWKV_DEVICE=cpu trains on the CPU"
      else
        [ "$stack" = cu117 ] || other=cu117
        mend="take the image of the stack $other: make image STACK=$other, and STACK=$other in .env"
      fi
      refuse "$name has compute capability $capability, and the stack $stack has code for ${archs:-none }only" "$mend"
    fi
  done <<<"$seen"
}

drivers() {  # MAJOR VERSION OF CUDA: sets oldest, the oldest driver that runs it, own, the driver that the stack's CUDA came with, and cuda, that CUDA
  local major
  while read -r major oldest own cuda; do [ "$major" != "$1" ] || return 0; done <rwkv/drivers.txt
}

has_code() {  # CAPABILITY ARCHS: code runs on GPUs of the same major version and the same or a later minor one
  local arch
  for arch in $2; do
    if [ $((arch / 10)) = "${1%.*}" ] && [ $((arch % 10)) -le "${1#*.}" ]; then return 0; fi
  done
  return 1
}

check_shm() {
  local mib
  mib=$(($(stat --file-system --format '%b * %S' /dev/shm) / 1048576)) || mib=0
  [ "$mib" -ge 1024 ] || refuse "shared memory (/dev/shm) has $mib MiB, and processes that share batches need 1024" "docker run --ipc=host, or --shm-size=8g (compose.yaml says so already)"
}

check_writable() {  # FOLDER...
  local folder
  for folder in "$@"; do
    if ! [ -w "$folder" ] || ! (f=$(mktemp "$folder/.writable.XXXXXX") && rm "$f") 2>/dev/null; then
      refuse "$folder is not writable by user $(id -u), group $(id -g)" "chown -R $(id -u):$(id -g) the folder that is mounted at $PWD/$folder, or set UID and GID to its owner's in .env (make compose-env writes them)"
    fi
  done
}

export RWKV_CONTAINER=${RWKV_CONTAINER:-docker/entrypoint.sh}  # how printed commands begin; compose.yaml sets its own
job=${1:-lora}
shift || true
python=${PYTHON:-python}
asked() { [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; }
case $job in
  lora | finetune | pretrain | demo)
    if ! asked "$@"; then
      if gpu_is_wanted "$@"; then check_gpu; fi
      check_shm
      check_writable out
    fi ;;
  generate)
    if ! asked "$@" && gpu_is_wanted "$@"; then check_gpu; fi ;;
  convert | merge | export)
    asked "$@" || check_writable out ;;
esac

case $job in
  demo) PY=$python exec scripts/demo.sh ;;
  lora) if [ $# -gt 0 ]; then exec "$python" scripts/lora.py "$@"; else PY=$python exec scripts/demo.sh; fi ;;
  inspect) exec "$python" scripts/inspect_data.py "$@" ;;
  merge) exec "$python" scripts/merge_lora.py "$@" ;;
  test) if [ $# -gt 0 ]; then exec "$python" -m pytest "$@"; else exec "$python" -m pytest tests/image; fi ;;
  shell) exec bash "$@" ;;
  *) if [ -f "scripts/$job.py" ]; then exec "$python" "scripts/$job.py" "$@"; else exec "$job" "$@"; fi ;;
esac
