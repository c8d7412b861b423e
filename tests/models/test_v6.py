"""RWKV-6 and RWKV-5.2 against PyPI's `rwkv`, float64 loops written from their descriptions, and
themselves evaluated in other ways.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import v6_loop

from rwkv.adapters import lora
from rwkv.models import RWKV, v6, version
from rwkv.models.gated_heads import PARTS, decays, lr_scale

ORACLE = Path(sys.prefix) / "oracle"
# -I: the oracle's `rwkv` must not be ours. torch 1.13's load has no mmap.
PROGRAM = """
import json, os, sys, torch
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
load = torch.load
torch.load = lambda *a, mmap=None, **k: load(*a, **k)
sys.path.insert(0, sys.argv[1])
from rwkv.model import RWKV
model, tokens = RWKV(sys.argv[2], "cpu fp32"), json.loads(sys.argv[4])
whole, last = model.forward(list(tokens), None, full_output=True)
state, single = None, []
for token in tokens:
    logits, state = model.forward([token], state)
    single.append(logits.clone())
torch.save([whole, last, torch.stack(single), state], sys.argv[3])
"""
LOOPS = {"6": v6_loop.forward}
SIZES = [
    ("6", {}),
    ("6", {"n_layer": 1}),
    ("6", {"n_layer": 3, "n_embd": 48, "dim_att": 64, "head_size": 32, "dim_ffn": 80}),
    ("6", {"rank_mix": 8, "rank_w": 24}),
]


@pytest.fixture
def make(make_model):
    return lambda version, sizes: make_model(version=version, **{"n_embd": 32, **sizes})


def tokens(batch=2, length=37, vocab=50):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.skipif(
    bool(os.environ.get("PY")), reason="make was given a Python of its own, and installs no oracle beside it"
)
@pytest.mark.parametrize("number", LOOPS)
@pytest.mark.parametrize("n_layer", [1, 3])
def test_logits_and_states_match_pypi_rwkv(make, tmp_path, number, n_layer):
    assert ORACLE.is_dir(), "the oracle is installed by: make test"
    model = make(number, {"n_layer": n_layer, "n_embd": 128, "head_size": 64}).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(weights, tmp_path / "model.pth")
    ids = tokens(1, 20)[0].tolist()
    command = [sys.executable, "-I", "-c", PROGRAM, ORACLE, tmp_path / "model", tmp_path / "out.pt", json.dumps(ids)]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, last, single, state = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        logits, ours = model(torch.tensor([ids]))
    for found in (whole, single):
        torch.testing.assert_close(logits[0], found, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    for other in (last, state):
        assert len(other) == 3 * n_layer
        for mine, found in zip((t for block in ours for t in block), other, strict=True):
            torch.testing.assert_close(mine[0], found.view_as(mine[0]), rtol=1e-4, atol=1e-4)


TENSORS = {
    "6": "maa_x maa_w maa_k maa_v maa_r maa_g maa_w1 maa_w2 decay decay_w1 decay_w2 faaaa",
}
CHANNEL_MIX = {"6": "maa_k maa_r"}


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


@pytest.mark.parametrize(("number", "sizes"), SIZES, ids=str)
def test_logits_and_gradients_match_float64_loop(make, number, sizes):
    model = make(number, sizes)
    ours = model(tokens())[0]
    p = {name: parameter.detach().double().requires_grad_() for name, parameter in model.named_parameters()}
    theirs = LOOPS[number](p, tokens())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)  # fp32
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    for name, parameter in model.named_parameters():
        expected = p[name].grad
        # relative to the largest element: small ones are differences of large ones; the loop itself
        # deviates by up to 7e-5 in fp32
        error = float((parameter.grad - expected).abs().max())
        assert error <= 2e-4 * float(expected.abs().max().clamp_min(1)), f"{name}: {error}"


@pytest.mark.parametrize(("number", "sizes"), SIZES, ids=str)
def test_token_by_token_matches_parallel(make, number, sizes):
    model = make(number, sizes).eval()
    with torch.no_grad():
        parallel, last = model(tokens())
        state, rows = None, []
        for t in range(37):
            logits, state = model(tokens()[:, t : t + 1], state)
            rows.append(logits)
        pieces, half = [], None
        for piece in tokens().split([11, 26], 1):
            logits, half = model(piece, half)
            pieces.append(logits)
    for found, end in ((rows, state), (pieces, half)):
        torch.testing.assert_close(torch.cat(found, 1), parallel, rtol=1e-4, atol=1e-4)  # fp32 matmuls of other shapes
        for ours, theirs in zip(end, last, strict=True):
            torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", LOOPS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_same_gradients(make, number, reentrant, frozen):
    gradients = []
    for grad_cp in (False, True):
        model = make(number, {"n_layer": 3})
        model.grad_cp, model.reentrant = grad_cp, reentrant
        if frozen:
            lora.inject(model, ["att"], 2, 4)
            lora.mark_trainable(model, ["att"])
            torch.manual_seed(4)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = torch.randn_like(parameter)
        model(tokens())[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, saved in gradients[0].items():
        assert torch.equal(saved, gradients[1][name]), name  # the same operations


@pytest.mark.parametrize(("number", "sizes"), SIZES[::2], ids=str)
@pytest.mark.parametrize("grad_cp", [False, True])
def test_packed_documents_match_separate_documents(make, number, sizes, grad_cp):
    lengths = [[5, 1, 9, 22], [37]]
    weights = torch.randn(2, 37, 50, generator=torch.Generator().manual_seed(2))
    reset = torch.zeros(2, 37, dtype=torch.bool)
    reset[0, [0, 5, 6, 15]] = True
    packed, separate = make(number, sizes), make(number, sizes)
    packed.grad_cp = grad_cp
    logits, state = packed(tokens(), reset=reset)
    (logits * weights).sum().backward()
    for row, parts in enumerate(lengths):
        begin = 0
        for length in parts:
            piece = slice(begin, begin + length)
            single, last = separate(tokens()[row : row + 1, piece])
            # fp32 matmuls of other shapes
            torch.testing.assert_close(logits[row, piece], single[0], rtol=1e-4, atol=1e-4)
            (single[0] * weights[row, piece]).sum().backward()
            begin += length
        for ours, theirs in zip(state, last, strict=True):
            torch.testing.assert_close([x[row] for x in ours], [x[0] for x in theirs], rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        # relative to the largest element: small ones are differences of large ones
        assert float((ours.grad - theirs.grad).abs().max()) <= 5e-5 * float(theirs.grad.abs().max().clamp_min(1)), name


@pytest.mark.parametrize("number", LOOPS)
def test_bf16_is_close_to_fp32(make, number):
    """Matmuls in bf16 (8 bits); decays, WKV and norms in fp32."""
    model = make(number, {"n_layer": 3, "n_embd": 64}).eval()
    with torch.no_grad():
        full = model(tokens())[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(tokens())[0]
    assert float((half - full).norm() / full.norm()) < 0.05


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


@pytest.mark.parametrize(("number", "sizes"), SIZES, ids=str)
def test_sizes_from_shapes(make, number, sizes):
    model = make(number, sizes)
    found = version.detect({name: parameter.shape for name, parameter in model.named_parameters()})
    assert found == (version.VERSIONS[number], model.sizes)


@pytest.mark.parametrize("number", LOOPS)
def test_impossible_head_size(number):
    Sizes = version.VERSIONS[number].Sizes
    with pytest.raises(ValueError, match="width 100 is not a multiple of the head size 64"):
        Sizes(2, 100)
    with pytest.raises(ValueError, match="head size is 24; it must be a multiple of 16"):
        Sizes(2, 48, head_size=24)


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
def test_frozen_matrices_not_zero(number):
    block = fresh(number, 2, frozen=True).blocks[0]
    assert all(part.weight.any() for part in (block.att.output, block.ffn.value, block.ffn.receptance))


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


@pytest.mark.parametrize("number", LOOPS)
def test_merged_adapter_computes_the_same(make, number):
    model = make(number, {}).eval()
    lora.inject(model, ["att", "ffn"], 2, 4)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before = model(tokens())[0]
        lora.merge(model)
        torch.testing.assert_close(model(tokens())[0], before, rtol=1e-4, atol=1e-4)  # fp32 rounding
