"""How the processes of this run were started, from the environment variables of torchrun, Slurm and
MPI.

Lightning takes the number of processes and ranks from these variables, and does not compare them
with --devices and --num_nodes. If the numbers differ, every process would train alone, or wait for
processes that are never started.
"""

import os

from rwkv.config import TrainConfig
from rwkv.errors import UserError

_ADVICE = "start the run with scripts/launch.sh (its --help has a line for each launcher)"


def check(c: TrainConfig) -> None:
    """Check that a launcher started as many processes as the flags specify. Called before the rank
    is used.

    Without a launcher rank 0 starts the others (see `peers.started`). A Slurm allocation with one
    process (sbatch or salloc without srun, or one task) is not a launcher, but Lightning would
    treat it as one, so the job is marked as interactive.

    Raises:
        UserError: the numbers differ, or the ranks of the processes are unknown.
    """
    for name in ("NODE_RANK", "GROUP_RANK"):
        if c.num_nodes == 1 and "RANK" not in os.environ and os.environ.get(name, "0") not in ("", "0"):
            raise UserError(
                f"{name}={os.environ[name]} in the environment means a machine other than the first, but --num_nodes is 1, and only the"
                f" first machine saves; unset it, or pass --num_nodes and {_ADVICE}"
            )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _compare(c, "torchrun", "WORLD_SIZE")
        _not_slurm()
    elif _slurm_tasks() > 1 and "SLURM_STEP_ID" in os.environ:
        _compare(c, "srun", "SLURM_NTASKS")
        if "SLURM_NTASKS_PER_NODE" not in os.environ:  # Lightning raises RuntimeError
            raise UserError(f"srun without --ntasks-per-node: pass --ntasks-per-node {c.devices}; or {_ADVICE}")
    elif "LOCAL_RANK" in os.environ:  # by `peers.started`, or set by hand
        _not_slurm()
        if "WORLD_SIZE" in os.environ:
            _compare(c, "the environment", "WORLD_SIZE")
    elif _number("OMPI_COMM_WORLD_SIZE") > 1 or _number("PMI_SIZE") > 1:
        raise UserError(f"mpirun does not set the ranks that PyTorch reads (RANK, WORLD_SIZE); {_ADVICE}")
    elif _number("WORLD_SIZE") > 1 or _number("RANK", 0) > 0:
        given = ", ".join(f"{name}={os.environ[name]}" for name in ("WORLD_SIZE", "RANK") if name in os.environ)
        raise UserError(
            f"{given} in the environment means several processes, but LOCAL_RANK is not set; {_ADVICE}, or unset them to"
            " train in one process"
        )
    else:
        _not_slurm()


def is_used() -> bool:
    """Whether this machine's processes have been started: by a launcher, by hand, or by rank 0."""
    srun = _slurm_tasks() > 1 and "SLURM_STEP_ID" in os.environ
    return srun or "LOCAL_RANK" in os.environ or "JSM_NAMESPACE_SIZE" in os.environ  # jsrun of LSF


def _compare(c: TrainConfig, launcher: str, name: str) -> None:
    if (started := _number(name)) != c.world_size:
        raise UserError(
            f"{launcher} means {started} processes ({name}), but --devices {c.devices} --num_nodes {c.num_nodes} means"
            f" {c.world_size}. Make them equal, or {_ADVICE}"
        )


def _number(name: str, default: int = 1) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _slurm_tasks() -> int:
    # Lightning does not treat jobs of these names as Slurm's
    return 0 if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") else _number("SLURM_NTASKS", 0)


def _not_slurm() -> None:
    """Make Lightning ignore Slurm's variables."""
    if "SLURM_NTASKS" in os.environ:
        os.environ["SLURM_JOB_NAME"] = "interactive"
