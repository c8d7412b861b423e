"""What is particular to RWKV-6 and RWKV-5.2 (see also test_v5_to_v7.py): names, decays, initial
weights, parameter groups.
"""

import math

import pytest
import torch
import v5_loop
import v6_loop

from rwkv.adapters import lora
from rwkv.models import RWKV, v5, v6, version
from rwkv.models.gated_heads import PARTS, lr_scale
from rwkv.models.parameters import decays

LOOPS = {"5.2": v5_loop.forward, "6": v6_loop.forward}


@pytest.fixture
def make(make_model):
    return lambda version, sizes: make_model(version=version, **{"n_embd": 32, **sizes})


def tokens(batch=2, length=37, vocab=50):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


TENSORS = {
    "5.2": "mix_k mix_v mix_r mix_g decay faaaa",
    "6": "maa_x maa_w maa_k maa_v maa_r maa_g maa_w1 maa_w2 decay decay_w1 decay_w2 faaaa",
}
CHANNEL_MIX = {"5.2": "mix_k mix_r", "6": "maa_k maa_r"}


@pytest.mark.parametrize("number", LOOPS)
def test_keys_of_a_released_file(make, number):
    names = set(dict(make(number, {}).named_parameters()))
    att = [f"time_{name}" for name in TENSORS[number].split()] + ["ln_x.weight", "ln_x.bias"]
    att += [f"{name}.weight" for name in ("receptance", "key", "value", "gate", "output")]
    ffn = [f"time_{name}" for name in CHANNEL_MIX[number].split()]
    ffn += ["key.weight", "receptance.weight", "value.weight"]
    every = {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    for i in (0, 1):
        every |= {f"blocks.{i}.{name}.{end}" for name in ("ln1", "ln2") for end in ("weight", "bias")}
        every |= {f"blocks.{i}.att.{name}" for name in att} | {f"blocks.{i}.ffn.{name}" for name in ffn}
    assert names == every


@pytest.mark.parametrize("number", LOOPS)
def test_extreme_decays(make, number):
    """Decays from e^(−8100) to 1 − 6e-6: finite values and gradients, those of the loop."""
    model = make(number, {})
    with torch.no_grad():
        for block in model.blocks:
            decay = block.att.time_decay
            decay.copy_(torch.linspace(-12, 9, decay.numel()).view(decay.shape))
    model(tokens())[0].square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    p = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens())[0].double(), LOOPS[number](p, tokens()), rtol=1e-4, atol=1e-4
        )  # fp32


# ---- sizes ----


def test_published_ranks():
    """Those of the released files: of the token shift, and of the decay."""
    found = {name: (s.rank_mix, s.rank_w, s.dim_ffn) for name, s in v6.PUBLISHED.items()}
    assert found == {"1.6b": (32, 64, 7168), "3b": (32, 64, 8960), "7b": (64, 128, 14336), "14b": (64, 128, 14336)}


def test_version_5_is_5_2():
    assert version.named("5") is version.named("5.2") is v5


# ---- initial weights, learning rates, adapters ----


def fresh(number, layers=3, D=64, V=100, N=32, frozen=False) -> RWKV:
    torch.manual_seed(0)
    model = RWKV(version.VERSIONS[number].Sizes(layers, D, V, head_size=N))
    model.initialise(6e-4, frozen)
    return model


def expected_vectors(number, layer, layers, D):
    """By upstream's formulas, of a block."""
    r, s = layer / (layers - 1) if layers > 1 else 0, 1 - layer / layers
    x, n = [i / D for i in range(D)], range(D)
    found = {
        "att.time_decay": [-6 + 5 * (i / (D - 1)) ** (0.7 + 1.3 * r) for i in n],
        "att.time_faaaa": [r * (1 - i / (D - 1)) + 0.1 * ((i + 1) % 3 - 1) for i in n],
        "att.ln_x.weight": [((1 + layer) / layers) ** 0.7] * D,
        "att.ln_x.bias": [0.0] * D,
    }
    mixes = {"k": [i**s for i in x], "v": [i**s + 0.3 * r for i in x], "r": [i ** (s / 2) for i in x]}
    mixes["g"] = mixes["r"]
    if number == "5.2":
        found |= {f"att.time_mix_{q}": mixes[q] for q in "kvrg"}
        return found | {f"ffn.time_mix_{q}": mixes["k"] for q in "kr"}
    found |= {f"att.time_maa_{q}": [1 - m for m in mixes["k" if q in "xw" else q]] for q in "xwkvrg"}
    return found | {f"ffn.time_maa_{q}": [1 - i ** (s**3) for i in x] for q in "kr"}


@pytest.mark.parametrize("number", LOOPS)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_initial_vectors(number, layers):
    for layer, block in enumerate(fresh(number, layers).blocks):
        for name, values in expected_vectors(number, layer, layers, 64).items():
            found = block.get_parameter(name).flatten()
            torch.testing.assert_close(found, torch.tensor(values), rtol=1e-6, atol=1e-6)  # fp32


def assert_orthogonal(weight, gain):
    weight = weight.detach() if weight.shape[0] <= weight.shape[1] else weight.detach().t()
    torch.testing.assert_close(weight @ weight.t(), gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-4)  # fp32 QR


@pytest.mark.parametrize("number", LOOPS)
def test_initial_matrices(number):
    model = fresh(number, 2)
    assert float(model.emb.weight.detach().abs().max()) <= 1e-4
    assert_orthogonal(model.head.weight, 0.5 * math.sqrt(100 / 64))
    for block in model.blocks:
        att, ffn = block.att, block.ffn
        for part in (att.output, ffn.value, ffn.receptance):
            assert not part.weight.any()
        for part, gain in ((att.receptance, 1), (att.key, 0.1), (att.value, 1), (att.gate, 0.1), (ffn.key, 1)):
            assert_orthogonal(part.weight, gain)
        low_rank = [p for name, p in att.named_parameters() if name.endswith(("_w1", "_w2"))]
        for down, up in zip(low_rank[::2], low_rank[1::2], strict=True):
            assert not down.any()
            assert 0.009 < float(up.detach().abs().max()) <= 0.01
        for name in ("ln1", "ln2"):
            assert bool((block.get_parameter(f"{name}.weight") == 1).all())


@pytest.mark.parametrize("number", LOOPS)
def test_learning_rate_and_decay_groups(make, number):
    for name, parameter in make(number, {}).named_parameters():
        decay, low_rank = name.endswith("time_decay"), name.endswith(("_w1", "_w2"))
        assert lr_scale(name, False) == (2 if decay else 1), name
        assert lr_scale(name, True) == (5 if ".time_" in name and not low_rank else 1), name
        matrix = name in ("emb.weight", "head.weight") or name.split(".")[-2] in (
            "receptance", "key", "value", "gate", "output",
        )  # fmt: skip
        assert decays(name, parameter.shape) == matrix, name


@pytest.mark.parametrize("number", LOOPS)
def test_adapter_parts(make, number):
    model = make(number, {})
    names = dict(model.named_parameters())
    layers = lora.inject(model, ["att", "ffn"], 2, 4)
    expected = {*PARTS.layers_of("att"), *PARTS.layers_of("ffn")}
    assert set(layers) == {f"blocks.{i}.{layer}" for i in (0, 1) for layer in expected}
    lora.mark_trainable(model, ["att", "ffn", "time", "ln"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in names if lora.is_matrix(name, names[name].shape)}
