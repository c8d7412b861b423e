"""When blocks run from a CUDA graph. That they do it right: tests/gpu/test_training_gpu.py."""

import pytest
import torch

from rwkv import compat
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.kernels import load
from rwkv.memory.estimate import estimate
from rwkv.memory.plan import Plan
from rwkv.models.version import published
from rwkv.train.loop import cuda_graph

BY_DEFAULT = "on" if compat.cuda_graphs_are_tested() else "off"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TrainConfig(), None),
        (LoRAConfig(lora_dropout=0.1, accumulate_grad_batches=2), None),
        (TrainConfig(grad_cp=1), None),
        (LoRAConfig(grad_cp=1, lora_dropout=0.1), None),
        (TrainConfig(grad_cp=1, dropout=0.1), None),
        (TrainConfig(devices=2), "a single GPU"),
        (TrainConfig(strategy="ddp"), "--strategy auto"),
        (TrainConfig(strategy="deepspeed_stage_2"), "--strategy auto"),
        (TrainConfig(tbptt_len=64), "--tbptt_len"),
        (TrainConfig(bf16_copies=1), None),
        (TrainConfig(version="7"), None),
        (TrainConfig(version="6"), None),
    ],
)
def test_used_if_possible(config, reason):
    assert cuda_graph.resolve(config, True) == (BY_DEFAULT if reason is None else "off")
    assert cuda_graph.resolve(config, False) == "off"
    config.cuda_graph = "on"
    if reason is None:
        assert cuda_graph.resolve(config, True) == "on"
    else:
        with pytest.raises(UserError, match=f"--cuda_graph on: .*{reason}"):
            cuda_graph.resolve(config, True)
    with pytest.raises(UserError, match="--cuda_graph on: it needs a GPU"):
        cuda_graph.resolve(config, False)
    config.cuda_graph = "off"
    assert cuda_graph.resolve(config, True) == "off"


def test_no_graph_without_compiled_kernels(make_model, monkeypatch):
    monkeypatch.setattr(load, "why_unavailable_on", lambda device: "not compiled")
    model, tokens = make_model().train(), torch.randint(50, (2, 9))
    assert torch.equal(cuda_graph.GraphedBlocks(model)(tokens), model.hidden(tokens)[0])


@pytest.mark.parametrize("lora", [False, True])
def test_memory_is_never_freed(lora):
    """All that the graph's pool holds counts in every phase."""
    plan = Plan(published("0.4b"), lora, micro_bsz=4)
    without, with_graph = estimate(plan), estimate(Plan(published("0.4b"), lora, micro_bsz=4, graph=True))
    for phase, parts in with_graph.phase_parts.items():
        assert parts["activations"] >= without.phase_parts["backward"]["activations"]
        assert parts["gradients"] >= without.phase_parts["optimizer"]["gradients"], phase
    assert without.total < with_graph.total < 1.5 * without.total
