"""Truncated BPTT: the loss of the full sequence, its gradient with --exact, activation memory of a
chunk.
"""

import subprocess
import sys

import pytest
import torch

from rwkv.adapters import lora
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.kernels.head_loss import head_loss
from rwkv.models.state import map_state
from rwkv.train.fit import fit
from rwkv.train.objectives import tbptt
from tests.train.small_runs import SMALL, TUNE, lines


def batch(rows=2, length=23, vocab=50, masked=True):
    torch.manual_seed(3)
    x, y = torch.randint(vocab, (2, rows, length))
    return x, y, torch.rand(rows, length) < 0.7 if masked else None, torch.rand(rows, length) < 0.1 if masked else None


def gradients(model, loss):
    torch.manual_seed(5)  # for dropout
    names, parameters = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True)
    value = loss()
    return value, dict(zip(names, torch.autograd.grad(3 * value, parameters), strict=True))


def full_sequence_loss(model, x, y, loss_mask, reset):
    return head_loss(model.hidden(x, reset=reset)[0], model.head.weight, y, loss_mask)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, grad in expected[1].items():
        # Different summation order: fp32 rounding of the largest entries.
        torch.testing.assert_close(
            found[1][name],
            grad,
            rtol=1e-5,
            atol=1e-5 * float(grad.abs().max()) + 1e-9,
            msg=lambda m, n=name: f"{n}: {m}",
        )


LENGTHS, VERSIONS = [1, 5, 8, 22], ["4", "5.2", "6", "7"]
# every length with every version, and each of them with every combination of masked and tuned
TUNED = [(tuned, masked) for tuned in ("all", "lora") for masked in (False, True)]
EXACT = [
    (length, version, *TUNED[(i + j) % 4]) for i, length in enumerate(LENGTHS) for j, version in enumerate(VERSIONS)
]


@pytest.mark.parametrize(("length", "version", "tuned", "masked"), EXACT)
@pytest.mark.filterwarnings("ignore:wkv[67] falls back")
def test_exact_gradients_match_full_sequence(make_model, length, masked, tuned, version):
    model = make_model(version=version)
    if tuned == "lora":
        lora.inject(model, ["att", "ffn"], 4, 8)
        lora.mark_trainable(model, ["att", "ffn", "ln", "time"])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    if version != "4":  # norms by head magnify fp32 rounding more than the tolerance
        model.double()
    data = batch(masked=masked)
    found = gradients(model, lambda: tbptt.mean_loss(model, *data, length, exact=True))
    assert_same(found, gradients(model, lambda: full_sequence_loss(model, *data)))


def test_truncated_gradients(make_model):
    model, (x, y, loss_mask, reset) = make_model(), batch()

    def plain_loop():
        state, total = None, 0
        for i in range(0, x.shape[1], 5):
            if state:
                state = map_state(torch.Tensor.detach, state)
            hidden, state = model.hidden(x[:, i : i + 5], state, reset[:, i : i + 5].contiguous())
            total = (
                total
                + head_loss(hidden, model.head.weight, y[:, i : i + 5], loss_mask[:, i : i + 5])
                * loss_mask[:, i : i + 5].sum()
            )
        return total / loss_mask.sum()

    found, expected = (
        gradients(model, lambda: tbptt.mean_loss(model, x, y, loss_mask, reset, 5, exact=False)),
        gradients(model, plain_loop),
    )
    assert_same(found, expected)
    exact = gradients(model, lambda: full_sequence_loss(model, x, y, loss_mask, reset))
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-6)
    difference = found[1]["blocks.0.att.key.weight"] - exact[1]["blocks.0.att.key.weight"]
    assert float(difference.abs().max()) > 1e-4  # truncated and exact gradients differ


def test_recomputation_repeats_dropout(make_model):
    def run(exact):
        model = make_model()
        lora.inject(model, ["att", "ffn"], 4, 8, dropout=0.5)
        lora.mark_trainable(model, ["att", "ffn"])
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(generator=torch.Generator().manual_seed(1))
        found = gradients(model, lambda: tbptt.mean_loss(model, *batch(), 5, exact=exact))
        return found, torch.rand(1)

    (truncated, after), (exact, after_exact) = run(False), run(True)
    torch.testing.assert_close(truncated[0], exact[0], rtol=1e-5, atol=1e-6)  # the same masks in the forward pass
    assert torch.equal(after, after_exact)


@pytest.mark.parametrize("exact", [False, True])
def test_bf16_close_to_fp32(make_model, exact):
    model, data = make_model(), batch(masked=False)
    expected = gradients(model, lambda: tbptt.mean_loss(model, *data, 5, exact))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, lambda: tbptt.mean_loss(model, *data, 5, exact))
    for name, grad in expected[1].items():  # a few consecutive roundings to 8 bits
        assert float((found[1][name] - grad).norm()) < 0.05 * float(grad.norm()) + 1e-7, name


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from rwkv.memory import machine
from rwkv.models import RWKV
from rwkv.models.v4 import Sizes
from rwkv.train.objectives import tbptt
model = RWKV(Sizes(2, 64, 500, 64, 256))
model.initialise(1e-4)
def peak(length):
    x = torch.randint(500, (1, length))
    tbptt.mean_loss(model, x, x, None, None, 128, exact=sys.argv[1] == "True").backward()
    return machine.rss_peak() / 2**20
first = peak(512)
print(peak(8192) - first)
"""


@pytest.mark.parametrize("exact", [False, True])
def test_memory_per_chunk(exact):
    growth = float(
        subprocess.run([sys.executable, "-c", MEMORY, str(exact)], check=True, capture_output=True, text=True).stdout
    )
    # MiB. Measured: 4; the full sequence takes 135.
    assert growth < 15


def test_exact_run_matches_plain_run(make_data, make_base, tmp_path):
    data, base = make_data(200), make_base()
    for config, more in ((TrainConfig, SMALL), (LoRAConfig, TUNE | {"load_model": str(base), "lora_dropout": 0.0})):
        losses = []
        for i, flags in enumerate(({}, {"tbptt_len": 3, "exact": True})):
            folder = tmp_path / f"{config.__name__}{i}"
            fit(config(**more, **flags, data_file=data, proj_dir=str(folder), lr_init=1e-2, lr_final=1e-2))
            losses.append([line["loss"] for line in lines(folder)])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0][0] != losses[0][-1]


def test_exact_needs_tbptt_len(make_data):
    with pytest.raises(UserError, match="--exact applies to --tbptt_len only"):
        fit(TrainConfig(**SMALL, data_file=make_data(200), exact=True))
