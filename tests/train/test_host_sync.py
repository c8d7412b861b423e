"""No training step synchronises the host with the GPU; tested on a CPU with a fake device
(host_sync.py).
"""

import pytest
import torch

from rwkv.checkpoint import read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import mask_path
from rwkv.kernels.head_loss import head_loss
from rwkv.train.callbacks import metrics
from rwkv.train.fit import fit
from tests.train import fused_adam_on_cpu, host_sync
from tests.train.host_sync import FakeDevice, HostSync
from tests.train.small_runs import SMALL, TUNE, lines, poisoned

FIRST, LAST = 2, 5  # no synchronisation from step FIRST to before step LAST, which is the last and saves


@pytest.fixture
def device(monkeypatch):
    """Train on a fake device."""
    fake = FakeDevice()
    host_sync.use(monkeypatch, fake, FIRST, LAST)
    fused_adam_on_cpu.use_on_cpu(monkeypatch)
    return fake


VARIANTS = {
    "plain": {},
    "reset": {"doc_reset": 1},
    "grad_cp": {"grad_cp": 1},
    "chunks": {"tbptt_len": 3},
    "exact chunks": {"tbptt_len": 3, "exact": True},
    "accumulated": {"accumulate_grad_batches": 2, "epoch_steps": 200},
    "decay": {"weight_decay": 0.1},
    "skip": {"on_nan": "skip"},
    "skip with decay": {"on_nan": "skip", "weight_decay": 0.1},
    "bf16": {"precision": "bf16"},
}


# every pair of two values
CASES = [(variant, *case) for i, variant in enumerate(VARIANTS) for case in (("full", i % 2 > 0), ("lora", i % 2 == 0))]


@pytest.mark.parametrize(("variant", "method", "masked"), CASES)
def test_no_host_sync(device, make_base, make_data, tmp_path, variant, method, masked):
    config, flags = TrainConfig, SMALL
    if method == "lora":
        config, flags = LoRAConfig, TUNE | {"load_model": str(make_base()), "lora_dropout": 0.1}
    data = make_data(500)
    if masked:
        mask_path(data).write_bytes(bytes(i % 3 > 0 for i in range(500)))
    flags = flags | {"epoch_steps": 100, "epoch_count": 1, "max_steps": LAST + 1} | VARIANTS[variant]
    fit(config(**flags, data_file=data, proj_dir=str(tmp_path / "run")))
    assert device.seen > 100 * (LAST - FIRST)  # a step of this model has some 300 operations
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, LAST + 2))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_device_skips_same_step_as_host(make_base, tmp_path, monkeypatch, decay):
    flags = poisoned(make_base, tmp_path) | {"on_nan": "skip", "weight_decay": decay}
    runs = []
    for name in ("host", "device"):
        if name == "device":
            monkeypatch.setattr(metrics, "reads_one_step_late", lambda device: True)
            fused_adam_on_cpu.use_on_cpu(monkeypatch)
        result = fit(TrainConfig(**flags, proj_dir=str(tmp_path / name)))
        assert any(line["loss"] is None for line in lines(tmp_path / name))
        runs.append((lines(tmp_path / name), read_tensors(result.checkpoint)))
    (host, weights), (device, same) = runs
    for one, other in zip(host, device, strict=True):
        assert (one["loss"] is None) == (other["loss"] is None)
        assert one["loss"] is None or other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for key, value in weights.items():
        # the same operations in different order
        torch.testing.assert_close(same[key], value, rtol=1e-4, atol=1e-6, equal_nan=True)


def item(x):
    return x.sum().item()


def truth(x):
    return bool(x.sum() > 0)


def mask(x):
    return x[x > 0]


def nonzero(x):
    return x.nonzero()


def tolist(x):
    return x.tolist()


def to_cpu(x):
    return x.cpu()


def numpy(x):
    return x.numpy()


def set_by_mask(x):
    x[x > 0] = x[x > 0]


def masked_loss(x):
    return head_loss(x, torch.ones(5, 3), torch.zeros(2, dtype=torch.long), x[:, 0] > 0)


SYNCING = [item, truth, mask, nonzero, tolist, to_cpu, numpy, set_by_mask, masked_loss]


@pytest.mark.parametrize("read", SYNCING, ids=lambda function: function.__name__)
def test_sync_detected(read):
    x, device = torch.ones(2, 3), FakeDevice()
    device.place(x)
    with device:
        read(torch.ones(2, 3))  # on the host
        read(x)  # not armed
        device.armed = True
        read(torch.ones(2, 3))
        with pytest.raises(HostSync):
            read(x * 1)
