"""--precision auto on simulated GPUs."""

import pytest
import torch

from rwkv.config import TrainConfig
from rwkv.train.runtime import trainer

CASES = [  # compute capabilities of the GPUs used, the precision, whether fp16 is recommended
    ([(8, 0)], "bf16", False),
    ([(9, 0), (12, 0)], "bf16", False),
    ([(7, 5)], "fp32", True),  # torch 2 reports bf16 as supported, but emulates it
    ([(7, 0)], "fp32", True),
    ([(6, 1)], "fp32", False),
    ([(8, 6), (7, 5)], "fp32", True),
]


@pytest.mark.parametrize(("capabilities", "precision", "fp16"), CASES)
def test_auto_precision_by_gpu(monkeypatch, capabilities, precision, fp16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities) + 1)  # the last one is not used
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [*capabilities, (3, 5)][i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {capabilities[i]}")
    config = TrainConfig(devices=len(capabilities))
    assert trainer.precision_of(config) == precision
    note = trainer.slow_on_gpu(config, precision)
    assert ("--precision fp16 would be several times faster" in note) == fp16
    assert not fp16 or f"GPU {min(capabilities)} does not support bf16" in note
    assert trainer.slow_on_gpu(TrainConfig(accelerator="cpu"), "fp32") == ""
