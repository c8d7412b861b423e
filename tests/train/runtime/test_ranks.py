"""All ranks use the flags that rank 0 resolved, whichever launcher started them; ranks that differ
end with an error.
"""

import dataclasses
import json
import os

import pytest
import torch
import torch.distributed as dist

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.models.v4 import Sizes
from rwkv.train.resume import state_files
from rwkv.train.run import Run
from rwkv.train.runtime import ranks
from rwkv.train.runtime.lightning import rank_zero_only
from tests.forked import free_port

# Only the CPU of one rank has bf16 instructions.
PROGRAM = """
import os, runpy
from rwkv.train.runtime import cpu
cpu._features = lambda: {"amx_bf16"} if os.environ.get("LOCAL_RANK", "0") == os.environ["BF16"] else set()
runpy.run_path(os.environ["SCRIPT"], run_name="__main__")
"""
# torchrun, which forks its workers instead of starting Pythons that import torch;
# tests/scripts/test_launch.py runs the command.
TORCHRUN = """
import os, runpy, sys
from torch.distributed import launcher, run
from rwkv.train.runtime.lightning import rank_zero_only
def train():
    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning reads it when it is imported
    sys.argv = [arguments.training_script, *arguments.training_script_args]
    runpy.run_path(arguments.training_script, run_name="__main__")
arguments = run.parse_args(sys.argv[1:])
config = run.config_from_args(arguments)[0]
config.start_method = "fork"
launcher.elastic_launch(config, train)()
"""


@pytest.fixture
def train(start, two_ranks, make_base, make_data, tmp_path, root):
    """Train LoRA on two processes: the run's folder, the rank with bf16, the launcher
    ("Lightning", "torchrun", or none), further flags.
    """
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    flags = {
        "load_model": make_base(),
        "data_file": make_data(300),
        "ctx_len": 8,
        "micro_bsz": 1,
        "epoch_count": 1,
        "epoch_steps": 6,
    }
    flags |= {"accelerator": "cpu", "devices": 2, "lora_dropout": 0.2, "lr_init": 1e-2}
    common = {"PYTHONPATH": str(root), "SCRIPT": str(root / "scripts/lora.py"), "OMP_NUM_THREADS": "1"}

    def run(folder: str, bf16: int, launcher: str = "", status: int = 0, **more) -> str:
        arguments = [
            str(word)
            for name, value in {**flags, "proj_dir": tmp_path / folder, **more}.items()
            for word in (f"--{name}", value)
        ]
        environment = {**common, "BF16": str(bf16)}
        if not launcher:
            return two_ranks(tmp_path / "train.py", *arguments, status=status, **environment)
        environment = os.environ | environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        words = [tmp_path / "train.py"]
        if launcher == "torchrun":
            words = [tmp_path / "torchrun.py", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
            words += ["--master_port", str(free_port()), str(tmp_path / "train.py")]
        result = start(*words, *arguments, environment=environment).result()
        assert result.returncode == status, result
        return result.stdout + result.stderr

    return run


def resolved(folder) -> tuple[str, int, list[float]]:
    run = json.loads((folder / "run.json").read_text())
    return (
        run["precision"],
        run["seed"],
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )


@pytest.mark.parametrize("launcher", ["Lightning", "torchrun"])
def test_ranks_use_precision_and_seed_of_rank_0(train, tmp_path, launcher):
    train("run", 1, launcher, max_steps=3)
    precision, seed, losses = resolved(tmp_path / "run")
    assert precision == "fp32"
    # A new run would use bf16 now. Without a launcher every rank reads the flags of the first run.
    train("run", 0, "torchrun" if launcher == "torchrun" else "")
    assert resolved(tmp_path / "run")[:2] == (precision, seed)
    train("uninterrupted", -1, precision="fp32", random_seed=seed)
    assert resolved(tmp_path / "uninterrupted")[2] == resolved(tmp_path / "run")[2]
    assert resolved(tmp_path / "run")[2][:3] == losses
    rng = [state["torch"] for state in state_files.newest(tmp_path / "run").rng]
    assert len(rng) == 2
    assert not torch.equal(*rng)  # different dropout masks


def test_ranks_with_different_flags(train, tmp_path):
    # A launcher without a store: each rank resolves its own flags.
    printed = train("run", 1, status=1, random_seed=1)
    assert "Traceback" not in printed
    assert printed.count("error: rank 1 differs from rank 0. --precision: bf16, rank 0: fp32") == 2, printed
    assert "replace auto by an explicit value (such as --precision fp32)" in printed
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()


def test_facts_compared_between_ranks():
    c = LoRAConfig(data_file="d", version="4", n_layer=1, n_embd=8)
    manifest = {
        "model": {},
        "precision": "fp32",
        "stack": {"torch": "2"},
        "data": {"prefix": "d", "sha256": "1"},
        "base": None,
    }

    def facts(flags, changed=None, model=None):
        run = Run(flags, Sizes(1, 8, 50, 8, 32), on_gpu=False)
        return ranks.facts(run, manifest | (changed or {}), model or torch.nn.Linear(2, 2))

    expected = facts(c)
    resumed = {
        "base": {"path": "run/rwkv-base.pth", "sha256": "2"},
        "data": {"prefix": "elsewhere/d", "sha256": "1"},
    }
    assert facts(dataclasses.replace(c, data_file="elsewhere/d", random_seed=3), resumed) == expected
    given = dataclasses.replace(c, load_model="base.pth")
    found = [facts(given, {"base": {"path": "base.pth", "sha256": x}}) for x in "23"]
    assert found[0] != found[1]
    assert facts(c, model=torch.nn.Linear(2, 2).bfloat16()) != expected


def test_lightning_ranks_receive_resolved_flags(monkeypatch):
    monkeypatch.delenv(ranks._RESOLVED, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    first, flags = ranks.Ranks(), TrainConfig(proj_dir="here", micro_bsz=8)
    assert first.receive() is None
    first.send(flags, dataclasses.replace(flags, precision="bf16", micro_bsz=4))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert ranks.Ranks().receive() is None  # another launcher: this rank resolves its own flags
    with first.passing_flags():
        assert ranks.Ranks().receive() == {"precision": "bf16", "micro_bsz": 4}
    assert ranks._RESOLVED not in os.environ


def test_torchrun_ranks_receive_resolved_flags(monkeypatch):
    store = dist.TCPStore("127.0.0.1", number := free_port(), is_master=True, wait_for_workers=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(number),
    }.items():
        monkeypatch.setenv(name, value)
    runs = iter((0, 0, 1, 1))
    monkeypatch.setattr(ranks, "_RUNS", runs)  # counted by each process
    for precision in ("bf16", "fp32"):  # two runs of the same processes
        monkeypatch.setattr(rank_zero_only, "rank", 0)
        ranks.Ranks().send(TrainConfig(), TrainConfig(precision=precision))
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        assert ranks.Ranks().receive() == {"precision": precision}
    del store
