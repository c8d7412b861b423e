"""A launcher must have started as many processes as the flags say."""

import os

import pytest

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.runtime import launcher

NAMES = (
    "TORCHELASTIC_RUN_ID",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_JOB_NAME",
)
NAMES = (*NAMES, "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_PROCID")
NAMES = (*NAMES, "JSM_NAMESPACE_SIZE")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
BATCH = {"SLURM_JOB_NAME": "train", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}
SRUN = {**BATCH, "SLURM_STEP_ID": "0"}
ALONE = {**SRUN, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:  # setenv first: an absent variable that the code sets would not be removed
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


# environment, processes of the flags, whether they have been started, whether Lightning must ignore
# Slurm
VALID = [
    ({}, 1, False, False),
    ({}, 8, False, False),
    (TORCHRUN, 2, True, False),
    ({**TORCHRUN, **BATCH}, 2, True, True),
    ({**TORCHRUN, **ALONE}, 2, True, True),
    (SRUN, 8, True, False),
    (BATCH, 1, False, True),  # sbatch or salloc without srun
    (BATCH, 4, False, True),
    (ALONE, 4, False, True),  # one task; rank 0 starts the other processes
    ({**SRUN, "SLURM_JOB_NAME": "interactive"}, 1, False, True),
    ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, True, False),  # started by rank 0
    ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", **ALONE}, 2, True, True),
    ({"WORLD_SIZE": "1", "RANK": "0"}, 1, False, False),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, 1, False, False),
    ({"PMI_SIZE": "8", **SRUN}, 8, True, False),
    ({"JSM_NAMESPACE_SIZE": "8"}, 8, True, False),
]


@pytest.mark.parametrize("name", ["NODE_RANK", "GROUP_RANK"])
def test_number_of_a_machine_in_a_run_on_one(environment, name):
    """The process would not be rank 0, so nothing would be saved."""
    environment({name: "1"})
    with pytest.raises(UserError, match=f"{name}=1 in the environment means a machine other than the first"):
        fit(TrainConfig())
    launcher.check(TrainConfig(num_nodes=2))


@pytest.mark.parametrize(("variables", "processes", "used", "ignored"), VALID, ids=str)
def test_valid_environment(environment, variables, processes, used, ignored):
    environment(variables)
    before = os.environ.get("SLURM_JOB_NAME")
    launcher.check(TrainConfig(devices=processes))
    assert os.environ.get("SLURM_JOB_NAME") == ("interactive" if ignored else before)
    assert launcher.is_used() == used


INVALID = [
    (TORCHRUN, 1, r"torchrun means 2 processes \(WORLD_SIZE\), but --devices 1 --num_nodes 1 means 1. Make them equal"),
    (TORCHRUN, 4, "torchrun means 2 processes"),
    (SRUN, 1, r"srun means 8 processes \(SLURM_NTASKS\), but --devices 1"),
    (
        {key: value for key, value in SRUN.items() if key != "SLURM_NTASKS_PER_NODE"},
        8,
        "srun without --ntasks-per-node",
    ),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, r"the environment means 2 processes \(WORLD_SIZE\)"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, 2, "mpirun does not set the ranks"),
    ({"PMI_SIZE": "2"}, 1, "mpirun does not set the ranks"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, 2, "WORLD_SIZE=2, RANK=0 in the environment .* LOCAL_RANK is not set"),
    ({"RANK": "1"}, 1, "RANK=1 in the environment"),
]


@pytest.mark.parametrize(("variables", "processes", "words"), INVALID, ids=str)
def test_invalid_environment(environment, variables, processes, words, tmp_path):
    environment(variables)
    with pytest.raises(UserError, match=f"{words}.* scripts/launch.sh"):
        fit(TrainConfig(data_file="none", devices=processes, proj_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
