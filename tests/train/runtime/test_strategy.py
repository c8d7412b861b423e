"""Strategies, invalid combinations of flags, DeepSpeed's configuration, and the optimizer of each
strategy.
"""

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train import checks
from rwkv.train.loop import adam, optimizer
from rwkv.train.runtime import strategy
from tests.train import fused_adam_on_cpu


def config(**flags) -> TrainConfig:
    return TrainConfig(**{"accelerator": "cpu", **flags})


@pytest.fixture
def deepspeed_available(monkeypatch):
    """Pretend that DeepSpeed can train on this machine."""
    monkeypatch.setattr(compat, "why_deepspeed_unavailable", lambda on_gpu: None)


@pytest.fixture
def ds_config(tmp_path):
    def write(value) -> str:
        path = tmp_path / "ds.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return write


def test_unknown_strategy():
    with pytest.raises(UserError, match="did you mean deepspeed_stage_2_offload"):
        strategy.check(config(strategy="deepspeed_stage2_offload"))


def test_deepspeed_not_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    with pytest.raises(
        UserError, match="DeepSpeed is not installed; run make venv to install it, or use --strategy ddp"
    ):
        strategy.check(config(strategy="deepspeed_stage_1"))
    strategy.check(config(strategy="ddp"))


def test_ddp_does_not_import_deepspeed(root):
    program = "import sys, rwkv.train.fit; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


@pytest.mark.skipif(compat.stack() != "cu117", reason="newer DeepSpeeds train on CPUs")
def test_deepspeed_07_on_cpu():
    with pytest.raises(UserError, match="DeepSpeed 0.7.0 trains on GPUs only; on a CPU use --strategy ddp"):
        strategy.check(config(strategy="deepspeed_stage_2"))


def test_deepspeed_config(deepspeed_available):
    for name, kind in strategy.ZEROS.items():
        settings = strategy.deepspeed_config(config(strategy=name, ds_bucket_mb=3, micro_bsz=5))
        zero = settings["zero_optimization"]
        assert (zero["stage"], "offload_optimizer" in zero, "offload_param" in zero) == (
            kind.stage,
            kind.offload_optimizer,
            kind.offload_weights,
        )
        assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"] == 3_000_000
        assert settings["train_micro_batch_size_per_gpu"] == 5


def test_deepspeed_config_valid(deepspeed_available):
    settings = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    for name in strategy.ZEROS:
        # DeepSpeed rejects unknown keys in this section only
        settings(**strategy.deepspeed_config(config(strategy=name))["zero_optimization"])


def test_ds_config_merged(deepspeed_available, ds_config):
    path = ds_config(
        {
            "wall_clock_breakdown": True,
            "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"pin_memory": True}},
        }
    )
    settings = strategy.deepspeed_config(config(strategy="deepspeed_stage_2_offload", ds_config=path))
    assert settings["wall_clock_breakdown"]
    assert not settings["zero_optimization"]["overlap_comm"]
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


WRONG = [
    (
        {"wall_clock_breakdwn": True},
        "unknown or unsupported key wall_clock_breakdwn; did you mean wall_clock_breakdown\\?",
    ),
    (
        {"zero_optimization": {"overlap_com": True}},
        "unsupported key zero_optimization.overlap_com; did you mean overlap_comm",
    ),
    (
        {"zero_optimization": {"offload_param": {"pinned": 1}}},
        "zero_optimization.offload_param.pinned; did you mean pin_memory",
    ),
    ({"train_batch_size": 8}, "train_batch_size is set by --micro_bsz, --devices"),
    ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is set by --strategy"),
    ({"zero_optimization": 3}, "zero_optimization must be an object; it is 3"),
    ("{", "not valid JSON"),
    ([1], "contains list, not a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_invalid_ds_config(deepspeed_available, ds_config, content, message):
    with pytest.raises(UserError, match=message):
        strategy.check(config(strategy="deepspeed_stage_3", ds_config=ds_config(content)))


def test_invalid_flags(deepspeed_available, ds_config):
    with pytest.raises(UserError, match="--ds_config .* needs DeepSpeed, but --strategy is ddp"):
        strategy.check(config(strategy="ddp", ds_config=ds_config({})))
    with pytest.raises(UserError, match="none.json: No such file"):
        strategy.check(config(strategy="deepspeed", ds_config="none.json"))
    with pytest.raises(UserError, match="--tbptt_len is not supported with ZeRO-3"):
        strategy.check(config(strategy="deepspeed_stage_3_offload", tbptt_len=4))
    with pytest.raises(UserError, match="--on_nan skip: DeepSpeed .* cannot skip steps"):
        strategy.check(config(strategy="deepspeed_stage_1", on_nan="skip"))
    with pytest.raises(UserError, match="--ds_bucket_mb must be at least 1"):
        checks.check_numbers(config(strategy="deepspeed", ds_bucket_mb=0))


def test_known_keys_exist_in_deepspeed():
    zero = importlib.import_module("deepspeed.runtime.zero.config")
    offload = importlib.import_module("deepspeed.runtime.zero.offload_config")
    known = {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
    }
    for place, model in known.items():
        fields = getattr(model, "model_fields", None) or model.__fields__  # pydantic 2 and 1
        assert {field.alias or name for name, field in fields.items()} >= strategy._KEYS[place]
    sources = "".join(
        inspect.getsource(importlib.import_module(f"deepspeed.{name}"))
        for name in ("runtime.config", "runtime.constants", "runtime.zero.config", "runtime.activation_checkpointing.config",
                     "runtime.swap_tensor.constants", "profiling.constants")
    )  # fmt: skip
    unread = {key for key in strategy._KEYS[""] if not re.search(f"[\"']{key}[\"']", sources)}
    assert unread <= ({"zero_force_ds_cpu_optimizer"} if compat.stack() == "cu117" else set())  # 0.7.0 ignores it


class Counted(torch.optim.Adam):
    """Adam with a step count per group, as DeepSpeed's FusedAdam."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        return super().step(closure)


def test_allocation_step_not_counted():
    def updated(allocate: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(3))
        adam = Counted([weight], lr=0.1)
        if allocate:  # as DeepSpeed 0.7.0 does in initialize_optimizer_states
            weight.grad = torch.zeros(3)
            adam.step()
            compat.reset_step_counts(adam)
        weight.grad = torch.tensor([1.0, -2.0, 3.0])
        adam.step()
        assert adam.param_groups[0]["step"] == 1
        return weight.detach()

    assert torch.equal(updated(True), updated(False))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch_adam_without_compiled_ops(make_model, decay):
    ops = importlib.import_module("deepspeed.git_version_info").installed_ops
    for name in ("auto", "deepspeed_stage_2", "deepspeed_stage_2_offload"):
        opt = optimizer.make(make_model(), config(strategy=name, weight_decay=decay))
        compiled = name != "auto" and ops.get("cpu_adam" if "offload" in name else "fused_adam")
        assert type(opt).__module__.startswith(
            "deepspeed." if compiled else "torch." if name != "auto" else "rwkv.train.loop.adam"
        )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["auto", "deepspeed_stage_1", "deepspeed_stage_1_offload"])
def test_adam_on_gpu(make_model, monkeypatch, name, decay):
    """The optimizer of a GPU (on a CPU: fused_adam_on_cpu.py) takes the same steps as one-pass Adam
    on a CPU. It is fused, or foreach where torch has no fused AdamW; with optimizer offload its
    state is on the CPU, and it is neither.
    """
    ops = importlib.import_module("deepspeed.git_version_info").installed_ops
    if name != "auto" and ops.get("cpu_adam" if "offload" in name else "fused_adam"):
        pytest.skip("DeepSpeed's own Adam is compiled")

    def trained(strategy_name):
        model = make_model()
        opt = optimizer.make(model, config(weight_decay=decay, strategy=strategy_name))
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.set_rates(opt, 1e-2, decay)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            opt.step()
        return model, opt

    expected, one_pass = trained("auto")
    assert type(one_pass) is adam.FusedAdam
    fused_adam_on_cpu.use_on_cpu(monkeypatch)
    model, opt = trained(name)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # fp32, three steps
    foreach = decay > 0 and name == "deepspeed_stage_1" and compat.stack() == "cu117"
    fused = name != "deepspeed_stage_1_offload" and not foreach
    for group in opt.param_groups:
        assert (bool(group.get("fused")), bool(group.get("foreach"))) == (fused, foreach)
    assert not getattr(opt, "_step_supports_amp_scaling", False)  # otherwise Lightning would refuse to clip
