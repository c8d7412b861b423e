#!/usr/bin/env bash
# One run on several machines, each with a process per GPU. All have this folder, the data and the models under the same paths; --proj_dir lies where all
# reach it, or at least where the first machine finds it again. After a machine was lost, the same command goes on from the last saved state; the others'
# processes end when they notice, torchrun of torch 1.13.1 up to five minutes later.
#
#   torchrun      On each machine, the first one's number is 0:
#                   scripts/launch.sh --nodes 2 --node 0 --master 10.0.0.1 -- scripts/lora.py --strategy deepspeed_stage_2 ...
#   a hostfile    On one machine, which reaches the others by ssh without a password. DeepSpeed's format, a line a machine: `10.0.0.1 slots=8`.
#                   scripts/launch.sh --hostfile hosts -- scripts/lora.py --strategy deepspeed_stage_2 ...
#   Slurm         sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 --wrap \
#                   'srun scripts/launch.sh -- scripts/lora.py --strategy deepspeed_stage_2 ...'
#   Kubernetes    kubectl apply -f docker/pytorchjob.yaml: Kubeflow says in each pod which one it is.
#
#   --nodes N     machines                                    --devices N   processes on each; left out: its GPUs, or 1
#   --node I      this one's number, from 0                   --port N      on the first one, 29500
#   --master A    the first one's address                     --print       say the command, do not run it
#
# --num_nodes and --devices need not be given to the script. PY: the Python; SSH: another ssh. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the
# network interface, where machines have several.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

refuse() { echo "error: $*" >&2; exit 2; }

nodes='' node='' master='' devices='' port='' hostfile='' print=''
while (($#)); do
  case $1 in
    --nodes | --node | --master | --devices | --port | --hostfile) (($# > 1)) || refuse "$1 needs a value"; printf -v "${1#--}" %s "$2"; shift 2 ;;
    --print) print=1; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
    --) shift; break ;;
    *) refuse "$1 is not a flag of launch.sh (see --help); the script and its flags come after --" ;;
  esac
done
(($#)) || refuse "nothing to launch: give a script after --, such as -- scripts/lora.py --load_model base.pth --data_file mine.jsonl"

# From a hostfile: this script again on each machine, by ssh; when one ends badly, the others are ended too.
if [[ $hostfile ]]; then
  [[ -r $hostfile ]] || refuse "--hostfile $hostfile: no such file"
  hosts=() slots=()
  while read -r host rest || [[ $host ]]; do
    [[ -z $host || $host == \#* ]] && continue
    [[ $host =~ ^[A-Za-z0-9_][A-Za-z0-9_.:%@-]*$ ]] || refuse "--hostfile $hostfile: $host is not a machine's name or address"
    [[ -z $rest || $rest =~ ^slots=([1-9][0-9]*)[[:space:]]*$ ]] || refuse "--hostfile $hostfile: a line is 'address slots=N'; this one is '$host $rest'"
    hosts+=("$host") slots+=("${BASH_REMATCH[1]:-}")
    [[ $rest ]] || slots[-1]=''
    [[ ${slots[-1]} == "${slots[0]}" ]] || refuse "--hostfile $hostfile: $host has other slots than ${hosts[0]}; every machine runs the same number of processes, give all the same"
  done <"$hostfile"
  ((${#hosts[@]})) || refuse "--hostfile $hostfile: names no machine"
  carried=()
  for name in PY GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME OMP_NUM_THREADS; do
    [[ ${!name:-} ]] && carried+=("$name=${!name}")
  done
  started=()
  trap 'kill "${started[@]}" 2>/dev/null || true' EXIT
  for i in "${!hosts[@]}"; do
    count=${devices:-${slots[$i]}}
    command=(env "${carried[@]}" "$here/scripts/launch.sh" --nodes ${#hosts[@]} --node "$i" --master "${master:-${hosts[0]}}" ${port:+--port "$port"}
      ${count:+--devices "$count"} ${print:+--print} -- "$@")
    # -tt: the terminal's end reaches what was started there. The words pass one more shell, hence %q.
    # shellcheck disable=SC2086
    ${SSH:-ssh -tt -o BatchMode=yes --} "${hosts[$i]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")" </dev/null &
    started+=($!)
    [[ $print ]] && wait $!
  done
  [[ $print ]] && exit
  for _ in "${started[@]}"; do wait -n; done
  exit
fi

# Slurm and Kubeflow say it in the environment: the latter as torchrun's own variables, or, if older, as those of one process per pod.
if [[ -z $nodes && ${SLURM_NODEID:-} ]]; then
  nodes=$SLURM_NNODES node=$SLURM_NODEID
  master=${master:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  devices=${devices:-${SLURM_GPUS_ON_NODE:-}}
  export SLURM_JOB_NAME=interactive # or Lightning counts Slurm's tasks as its ranks
elif [[ -z $nodes && ${PET_NNODES:-} ]]; then
  nodes=${PET_NNODES%%:*} node=$PET_NODE_RANK master=${master:-$PET_MASTER_ADDR} port=${port:-$PET_MASTER_PORT}
  [[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]] && devices=${devices:-$PET_NPROC_PER_NODE}
elif [[ -z $nodes && ${MASTER_ADDR:-} && ${WORLD_SIZE:-} && ${RANK:-} ]]; then
  nodes=$WORLD_SIZE node=$RANK master=${master:-$MASTER_ADDR} port=${port:-${MASTER_PORT:-}}
fi
[[ $nodes && $node && $master ]] || refuse "give --nodes, --node and --master, or --hostfile; or run it under Slurm or Kubeflow (see --help)"
[[ $nodes =~ ^[1-9][0-9]*$ && $node =~ ^[0-9]+$ && $node -lt $nodes ]] || refuse "--node $node of --nodes $nodes: nodes are numbered from 0"
if [[ -z $devices ]]; then
  devices=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
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
