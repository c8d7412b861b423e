"""What is particular to RWKV-7 (see also test_v5_to_v7.py): `rwkv7-hf` as an oracle, names, initial
weights, parameter groups.
"""

import math

import pytest
import torch

from rwkv.adapters import lora
from rwkv.models import RWKV
from rwkv.models.v7 import PARTS, PUBLISHED, Sizes, decays, lr_scale
from tests.oracle import ask, needs_oracle

# rwkv7-hf has its own names and shapes, and gradients by autograd
PROGRAM_HF = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from rwkv7_hf.converter import infer_config, translate_name
from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM
cases, ids, factors = torch.load(sys.argv[2])
found = []
for weights in cases:
    config = infer_config(weights, "float32", "reference", False)
    config.use_cache = False
    model = RWKV7ForCausalLM(config).train()
    theirs, ours = dict(model.named_parameters()), {}
    for name, weight in weights.items():
        other, transposed = translate_name(name, config.num_hidden_layers)
        ours[name] = (theirs.pop(other), transposed)
        target = ours[name][0]
        target.data.copy_((weight.t() if transposed else weight).reshape(target.shape))
    assert not theirs, theirs.keys()
    logits = model(input_ids=ids).logits
    (logits * factors).sum().backward()
    gradients = {name: p.grad.t() if transposed else p.grad for name, (p, transposed) in ours.items()}
    found.append([logits.detach(), {name: grad.reshape(weights[name].shape) for name, grad in gradients.items()}])
torch.save(found, sys.argv[3])
"""


@pytest.fixture
def make(make_model):
    return lambda **sizes: make_model(version="7", **{"n_embd": 32, **sizes})


def tokens(batch=2, length=37, vocab=50):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@needs_oracle
def test_logits_and_gradients_match_rwkv7_hf(make, tmp_path):
    sizes = ({"n_layer": 1}, {"n_layer": 3, "rank_w": 8, "rank_a": 16, "rank_v": 24})
    models = [make(**one, n_embd=128, head_size=64, dim_ffn=320) for one in sizes]
    cases = [{name: parameter.detach() for name, parameter in model.named_parameters()} for model in models]
    ids = 1 + tokens(2, 20, 49)  # theirs pads with token 0, whose embedding has no gradient
    factors = torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(2))
    torch.save([cases, ids, factors], tmp_path / "in.pt")
    ask(PROGRAM_HF, tmp_path / "in.pt", tmp_path / "out.pt")
    for model, (logits, gradients) in zip(models, torch.load(tmp_path / "out.pt"), strict=True):
        ours = model(ids)[0]
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
        (ours * factors).sum().backward()
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            # relative to the largest element: small ones are differences of large ones
            error = float((parameter.grad - gradients[name]).abs().max())
            assert error <= 5e-5 * float(gradients[name].abs().max().clamp_min(1)), f"{name}: {error}"


def test_keys_are_those_of_released_files(make):
    """Without v0, v1, v2 in block 0."""
    names = set(dict(make().named_parameters()))
    att = "x_r x_w x_k x_v x_a x_g w0 w1 w2 a0 a1 a2 g1 g2 k_k k_a r_k".split()
    att += [f"{name}.weight" for name in ("receptance", "key", "value", "output", "ln_x")] + ["ln_x.bias"]
    every = {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    for i in (0, 1):
        every |= {f"blocks.{i}.{name}.{end}" for name in ("ln1", "ln2") for end in ("weight", "bias")}
        every |= {f"blocks.{i}.att.{name}" for name in [*att, *(["v0", "v1", "v2"] if i else [])]}
        every |= {f"blocks.{i}.ffn.{name}" for name in ("x_k", "key.weight", "value.weight")}
    assert names == every


# ---- sizes ----


def test_published_ranks():
    """Those of the released files (w, a, v, g)."""
    expected = {
        "0.1b": (64, 64, 32, 128), "0.4b": (64, 64, 32, 128), "1.5b": (96, 96, 64, 256), "2.9b": (96, 96, 64, 320),
        "7.2b": (128, 128, 96, 480), "13.3b": (192, 192, 128, 384),
    }  # fmt: skip
    found = {name: (s.rank_w, s.rank_a, s.rank_v, s.rank_g) for name, s in PUBLISHED.items()}
    assert found == expected


# ---- initial weights, learning rates, adapters ----


def fresh(layers=3, C=64, V=100, N=32, **sizes) -> RWKV:
    torch.manual_seed(0)
    model = RWKV(Sizes(layers, C, V, head_size=N, **sizes))
    model.initialise(6e-4)
    return model


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_initial_vectors(layers):
    C, N = 64, 32
    for layer, block in enumerate(fresh(layers, C, N=N, v_in_block_0=True).blocks):
        r = layer / (layers - 1) if layers > 1 else 0
        s = 1 - layer / layers
        n = range(C)
        z = [((i % N) - (N - 1) / 2) / ((N - 1) / 2) for i in n]
        zigzag, ramp = [v * abs(v) for v in z], [i / (C - 1) - 0.5 for i in n]
        expected = {
            **{f"att.x_{q}": [1 - (i / C) ** (0.2 * s) for i in n] for q in "rg"},
            **{f"att.x_{q}": [1 - (i / C) ** (0.9 * s) for i in n] for q in "wa"},
            **{f"att.x_{q}": [1 - (i / C) ** (0.7 * s) for i in n] for q in "kv"},
            "att.w0": [-6 + 6 * (i / (C - 1)) ** (1 + r**0.3) + 0.5 + 2.5 * zigzag[i] for i in n],
            "att.a0": [-0.19 + 0.3 * zigzag[i] + 0.4 * ramp[i] for i in n],
            "att.v0": [0.73 - 0.4 * ramp[i] for i in n],
            "att.k_k": [0.71 - 0.1 * ramp[i] for i in n],
            "att.k_a": [1.02] * C,
            "att.r_k": [-0.04] * C,
            "att.ln_x.weight": [((1 + layer) / layers) ** 0.7] * C,
            "att.ln_x.bias": [0.0] * C,
            "ffn.x_k": [1 - (i / C) ** (s**4) for i in n],
        }
        for name, values in expected.items():
            found = block.get_parameter(name).flatten()
            torch.testing.assert_close(found, torch.tensor(values), rtol=1e-6, atol=1e-6)  # fp32


def assert_orthogonal(weight, gain):
    weight = weight.detach() if weight.shape[0] <= weight.shape[1] else weight.detach().t()
    torch.testing.assert_close(weight @ weight.t(), gain**2 * torch.eye(len(weight)), rtol=1e-4, atol=1e-4)  # fp32 QR


def test_initial_matrices():
    model = fresh(2)
    assert float(model.emb.weight.detach().abs().max()) <= 1e-4
    assert_orthogonal(model.head.weight, 0.5 * math.sqrt(100 / 64))
    for i, block in enumerate(model.blocks):
        assert not block.att.output.weight.any()
        assert not block.ffn.value.weight.any()
        for part, gain in ((block.att.receptance, 1), (block.att.key, 0.1), (block.att.value, 1), (block.ffn.key, 1)):
            assert_orthogonal(part.weight, gain)
        for name in "wavg" if i else "wag":
            down, up = block.att.get_parameter(f"{name}1"), block.att.get_parameter(f"{name}2")
            assert not down.any()
            assert_orthogonal(up, 0.1 * max(1, math.sqrt(up.shape[0] / up.shape[1])))
        for name in ("ln1", "ln2"):
            assert bool((block.get_parameter(f"{name}.weight") == 1).all())


def test_learning_rate_and_decay_groups(make):
    for name, parameter in make().named_parameters():
        assert lr_scale(name, False) == (2 if name.endswith("att.w0") else 1)
        assert lr_scale(name, True) == (5 if name.endswith("att.w0") else 1)
        matrix = name in ("emb.weight", "head.weight") or name.split(".")[-2] in (
            "receptance", "key", "value", "output",
        )  # fmt: skip
        assert decays(name, parameter.shape) == matrix, name


def test_adapter_parts(make):
    model = make(v_in_block_0=True)
    names = dict(model.named_parameters())
    assert lora.inject(model, ["att", "ffn"], 2, 4) == [
        f"blocks.{i}.{layer}" for i in (0, 1) for layer in (*PARTS.layers_of("att"), *PARTS.layers_of("ffn"))
    ]
    lora.mark_trainable(model, ["att", "ffn", "time", "ln"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    unused = {f"blocks.0.att.v{i}" for i in range(3)}
    assert frozen == {name for name in names if lora.is_matrix(name, names[name].shape)} | unused
