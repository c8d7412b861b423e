#!/usr/bin/env bash
# Start one run on several machines, with one process per GPU.
#
# This folder, the data and the models must have the same paths on all machines. --proj_dir must be
# on shared storage, or at least on storage that the first machine can still read afterwards. If a
# machine fails, repeat the command to resume from the last training state; the processes on the
# other machines exit by themselves (torchrun of torch 1.13.1: after up to 5 minutes).
#
#   torchrun      On each machine, with the first one as --node 0:
#                   scripts/launch.sh --nodes 2 --node 0 --master 10.0.0.1 -- scripts/lora.py --strategy deepspeed_stage_2 ...
#   hostfile      On one machine, which can ssh to the others without a password. DeepSpeed's format,
#                 one line per machine, such as `10.0.0.1 slots=8`:
#                   scripts/launch.sh --hostfile hosts -- scripts/lora.py --strategy deepspeed_stage_2 ...
#   Slurm         sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --wrap \
#                   'srun scripts/launch.sh -- scripts/lora.py --strategy deepspeed_stage_2 ...'
#   Kubernetes    kubectl apply -f docker/pytorchjob.yaml (Kubeflow sets the rank of each pod)
#
#   --nodes N     number of machines                 --devices N   processes per machine (default: its GPUs, or 1)
#   --node I      index of this machine, from 0      --port N      port on the first machine (29500)
#   --master A    address of the first machine       --print       print the command without running it
#
# --num_nodes and --devices are passed to the script automatically. Environment variables: PY (the
# Python), SSH (an ssh command), GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (the network interface).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

fail() { echo "error: $*" >&2; exit 2; }

nodes='' node='' master='' devices='' port='' hostfile='' print=''
while (($#)); do
  case $1 in
    --nodes | --node | --master | --devices | --port | --hostfile) (($# > 1)) || fail "$1 needs a value"; printf -v "${1#--}" %s "$2"; shift 2 ;;
    --print) print=1; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
    --) shift; break ;;
    *) fail "$1 is not a flag of launch.sh (see --help); the script and its flags come after --" ;;
  esac
done
(($#)) || fail "nothing to launch: pass a script after --, such as -- scripts/lora.py --load_model base.pth --data_file mine.jsonl"

# With a hostfile: run this script on each machine by ssh. If one fails, stop the others.
if [[ $hostfile ]]; then
  [[ -r $hostfile ]] || fail "--hostfile $hostfile: no such file"
  hosts=() slots=()
  while read -r host rest || [[ $host ]]; do
    [[ -z $host || $host == \#* ]] && continue
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.:%@-]*$ ]] || fail "--hostfile $hostfile: $host is not a host name or address"
    [[ -z $rest || $rest =~ ^slots=([1-9][0-9]*)[[:space:]]*$ ]] || fail "--hostfile $hostfile: expected lines such as 'address slots=N'; got '$host $rest'"
    hosts+=("$host") slots+=("${BASH_REMATCH[1]:-}")
    [[ $rest ]] || slots[-1]=''
    [[ ${slots[-1]} == "${slots[0]}" ]] || fail "--hostfile $hostfile: slots of $host and ${hosts[0]} differ; every machine must run the same number of processes"
  done <"$hostfile"
  ((${#hosts[@]})) || fail "--hostfile $hostfile: no machine listed"
  forwarded=()
  for name in PY GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME OMP_NUM_THREADS; do
    [[ ${!name:-} ]] && forwarded+=("$name=${!name}")
  done
  started=()
  trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
  for i in "${!hosts[@]}"; do
    count=${devices:-${slots[$i]}}
    command=(env "${forwarded[@]}" "$here/scripts/launch.sh" --nodes ${#hosts[@]} --node "$i" --master "${master:-${hosts[0]}}" ${port:+--port "$port"}
      ${count:+--devices "$count"} ${print:+--print} -- "$@")
    # -tt: the remote processes get SIGHUP when the connection closes. %q: the remote shell parses the command again.
    # shellcheck disable=SC2086
    ${SSH:-ssh -tt -o BatchMode=yes --} "${hosts[$i]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
    started+=($!)
    [[ $print ]] && wait $!
  done
  [[ $print ]] && exit
  for _ in "${started[@]}"; do wait -n; done
  exit
fi

# Slurm and Kubeflow set environment variables: Kubeflow those of torchrun (PET_*), older versions those of one process per pod (RANK).
if [[ -z $nodes && ${SLURM_NODEID:-} ]]; then
  [[ ${SLURM_LOCALID:-0} == 0 ]] || fail "srun started several tasks on this machine; it needs one: --ntasks-per-node 1"
  [[ $SLURM_NNODES == 1 || ${SLURM_STEP_ID:-} ]] || fail "this runs on the first of $SLURM_NNODES machines only; start it with srun"
  nodes=$SLURM_NNODES node=$SLURM_NODEID
  master=${master:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  devices=${devices:-${SLURM_GPUS_ON_NODE:-}}
  export SLURM_JOB_NAME=interactive # otherwise Lightning treats Slurm tasks as ranks
elif [[ -z $nodes && ${PET_NNODES:-} ]]; then
  nodes=${PET_NNODES%%:*} node=$PET_NODE_RANK master=${master:-$PET_MASTER_ADDR} port=${port:-$PET_MASTER_PORT}
  [[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] && devices=${devices:-$PET_NPROC_PER_NODE}
elif [[ -z $nodes && ${MASTER_ADDR:-} && ${WORLD_SIZE:-} && ${RANK:-} ]]; then
  nodes=$WORLD_SIZE node=$RANK master=${master:-$MASTER_ADDR} port=${port:-${MASTER_PORT:-}}
fi
[[ $nodes && $node && $master ]] || fail "pass --nodes, --node and --master, or --hostfile; or run it under Slurm or Kubeflow (see --help)"
[[ $nodes =~ ^[1-9][0-9]*$ && $node =~ ^[0-9]+$ && $node -lt $nodes ]] || fail "--node $node of --nodes $nodes: nodes are numbered from 0"
if [[ -z $devices ]]; then
  # like CUDA, which uses the devices in CUDA_VISIBLE_DEVICES up to the first invalid one, such as -1
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then
    devices=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *\(-.*\)\?$/,$d' | wc -l)
  else
    devices=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)
  fi
  ((devices)) || devices=1
fi
python=${PY:-$here/.venv/bin/python}
[[ -x $python || ${PY:-} ]] || python=python3
command=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$node" --nproc_per_node "$devices" --master_addr "$master"
  --master_port "${port:-29500}" "$@" --num_nodes "$nodes" --devices "$devices")
if [[ $print ]]; then
  echo "${command[*]}"
else
  unset WORLD_SIZE RANK MASTER_ADDR MASTER_PORT "${!PET_@}" # torchrun sets its own
  exec "${command[@]}"
fi
