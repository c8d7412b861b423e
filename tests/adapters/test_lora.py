"""LoRA against peft, upstream's names and initialisation, and merging."""

import math
import re

import peft
import pytest
import torch
from launches import Launches

from rwkv.adapter_files import load_tuned
from rwkv.adapters import lora
from rwkv.checkpoint import save_model
from rwkv.kernels.linear import Matrix
from rwkv.models import RWKV
from rwkv.models.layers import dropout_of
from rwkv.models.v4 import PARTS
from rwkv.models.version import VERSIONS

MATRICES = {"att": ["att.key", "att.value", "att.receptance"], "ffn": ["ffn.key", "ffn.receptance", "ffn.value"]}
TOKENS = torch.randint(50, (2, 15), generator=torch.Generator().manual_seed(0))


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
        if "lora_magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)


@pytest.mark.parametrize("parts", [["att"], ["ffn"], ["att", "ffn"], ["att", "ffn", "time", "ln"]])
def test_adapted_layers_match_upstream(make_model, parts):
    names = lora.inject(make_model(), parts, r=3, alpha=6)
    assert sorted(names) == sorted(f"blocks.{i}.{m}" for i in (0, 1) for part in parts for m in MATRICES.get(part, []))


@pytest.mark.parametrize(
    ("parts", "normalised"),
    [
        (["att.output"], ["att.output"]),
        (["ffn.value", "att.key", "ln"], ["att.key", "ffn.value", "ln"]),
        (["time", "att.receptance", "att.value", "att.key"], ["att", "time"]),
        (["att", "att.output", "ffn.key"], ["att", "att.output", "ffn.key"]),
    ],
)
def test_single_matrix_parts(make_model, parts, normalised):
    model = make_model(pre_ffn=True)
    names = lora.inject(model, parts, 3, 6)
    expected = {m for part in parts if part not in ("time", "ln") for m in MATRICES.get(part, [part])}
    assert {name.split(".", 2)[2].replace("ffnPre", "ffn") for name in names} == expected
    assert any("ffnPre" in name for name in names) == any(m.startswith("ffn") for m in expected)
    assert lora.parts_of(lora.adapter_state(model, parts), PARTS) == PARTS.normal(parts) == normalised


def test_trainable_parameters_match_upstream(make_model):
    model = make_model()
    lora.inject(model, ["att", "time", "ln"], 3, 6)
    lora.mark_trainable(model, ["att", "time", "ln"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"blocks.{i}.att.{m}.lora_{x}" for i in (0, 1) for m in ("key", "value", "receptance") for x in "AB"}
    expected |= {f"blocks.{i}.att.time_{n}" for i in (0, 1) for n in ("decay", "first", "mix_k", "mix_v", "mix_r")}
    expected |= {f"blocks.{i}.ffn.time_mix_{n}" for i in (0, 1) for n in "kr"}
    expected |= {
        f"blocks.{i}.{ln}.{x}"
        for i, ln in ((0, "ln0"), (0, "ln1"), (0, "ln2"), (1, "ln1"), (1, "ln2"))
        for x in ("weight", "bias")
    }
    assert trained == expected  # not emb, head, ln_out, att.output
    assert set(lora.adapter_state(model, ["att", "time", "ln"])) == expected


def test_dora_initialisation_is_identity(make_model):
    model = make_model(version="7")
    model.blocks[0].ffn.key.weight.data[3] = 0  # a row of zeros has no direction
    before = model(TOKENS)[0]
    lora.inject(model, ["all-linear"], 8, 32, dora=True)
    torch.testing.assert_close(model(TOKENS)[0], before, rtol=1e-5, atol=1e-5)  # m / ‖w‖ is 1 up to rounding
    model(TOKENS)[0].sum().backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_linear_is_every_matrix_of_the_blocks(make_model, version):
    model = make_model(version=version)
    matrices = {name for name, x in model.named_parameters() if lora.is_matrix(name, x.shape) and "blocks" in name}
    assert set(lora.inject(model, ["all-linear"], 2, 4)) == {name.removesuffix(".weight") for name in matrices}
    parts = VERSIONS[version].PARTS
    assert parts.normal(["all-linear"]) == lora.parts_of(lora.adapter_state(model, ["all-linear"]), parts)


@pytest.mark.parametrize("version", VERSIONS)
def test_single_layers(make_model, version):
    layers = ["att.output", "ffn.value"] + ["att.gate"] * (version in ("5.2", "6"))
    model = make_model(version=version)
    assert set(lora.inject(model, layers, 2, 4)) == {f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers}


def test_initialisation_is_identity(make_model):
    model = make_model(n_embd=64)
    before = model(TOKENS)[0]
    lora.inject(model, ["att", "ffn"], 8, 32)
    assert torch.equal(model(TOKENS)[0], before)
    key = model.blocks[0].att.key
    assert not key.lora_B.any()
    bound = math.sqrt(6 / ((1 + 5) * 64))  # kaiming_uniform with a = √5
    assert 0.8 * bound < float(key.lora_A.detach().abs().max()) <= bound


@pytest.mark.parametrize("dora", [False, True])
def test_outputs_and_gradients_match_peft(make_model, dora):
    ours, base = make_model(), make_model()
    lora.inject(ours, ["att", "ffn"], 4, 12, dora=dora)
    lora.mark_trainable(ours, ["att", "ffn"])
    randomise(ours)
    targets = r".*\.(att|ffn)\.(key|value|receptance)"
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=dora)
    peft_model = peft.get_peft_model(base, config)
    state = {}  # older versions of peft have no .weight in the name of the magnitudes
    for name, parameter in peft_model.named_parameters():
        state[name.removesuffix(".weight").removesuffix(".default").removeprefix("base_model.model.")] = parameter
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            state[name].data.copy_(parameter.data)
    found, expected = ours(TOKENS)[0], peft_model(TOKENS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            torch.testing.assert_close(
                parameter.grad, state[name].grad, rtol=1e-4, atol=1e-3
            )  # fp32; gradients of 1e2 … 1e3
        else:
            assert parameter.grad is None, name


def test_norms_of_dora_are_fp32_in_mixed_precision(make_model):
    model = make_model()
    lora.inject(model, ["att"], 4, 12, dora=True)
    randomise(model)
    layer = model.blocks[0].att.key
    whole = lora.merged(layer.weight, layer.lora_A, layer.lora_B, layer.scale)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer._norms()
    torch.testing.assert_close(found, torch.linalg.vector_norm(whole, dim=1).detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_folder_of_peft(make_model, tmp_path, rslora):
    base = make_model()
    save_model(tmp_path / "base.pth", base, {})
    targets = r".*\.(att|ffn)\.(key|value|receptance)"
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_dora=True, use_rslora=rslora)
    peft_model = peft.get_peft_model(base, config)
    randomise(peft_model)
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    ours, _ = load_tuned(tmp_path / "base.pth", tmp_path / "adapter")
    expected = peft_model(TOKENS)[0]
    torch.testing.assert_close(ours(TOKENS)[0], expected, rtol=1e-4, atol=1e-4)  # fp32, different order of sums
    assert (make_model()(TOKENS)[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("version", VERSIONS)
def test_weighted_combination_matches_peft(make_model, version):
    def create():
        return make_model(version=version)

    weights, adapters, peft_model = (0.7, -0.4), [], None
    for i, (part, r, alpha) in enumerate((("att", 4, 12), ("ffn", 2, 8))):  # different ranks, scales and layers
        layers = "|".join(map(re.escape, VERSIONS[version].PARTS.layers_of(part)))
        model, config = create(), peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=rf".*\.({layers})")
        torch.manual_seed(i)
        lora.inject(model, [part], r, alpha)
        randomise(model)
        adapters.append((lora.adapter_state(model, [part]), alpha / r, weights[i]))
        if peft_model is None:
            peft_model = peft.get_peft_model(create(), config, f"{i}")
        else:
            peft_model.add_adapter(f"{i}", config)
        state = dict(peft_model.named_parameters())
        for name, tensor in adapters[-1][0].items():
            state[f"base_model.model.{name}.{i}.weight"].data.copy_(tensor * (weights[i] if "lora_B" in name else 1))
    ours = create()
    lora.inject(ours, ["att", "ffn"], 6, 6)
    for name, tensor in lora.combine(adapters, dict(ours.named_parameters())).items():
        dict(ours.named_parameters())[name].data.copy_(tensor)
    peft_model.base_model.set_adapter(["0", "1"])  # both adapters are active
    torch.testing.assert_close(
        ours(TOKENS)[0], peft_model(TOKENS)[0], rtol=1e-4, atol=1e-4
    )  # fp32, different summation order


def test_weighted_combination_of_full_parameters(make_model):
    base = dict(make_model().named_parameters())
    name = "blocks.0.ln1.weight"
    adapters = [({name: base[name] + step}, 1.0, weight) for step, weight in ((1.0, 0.5), (-2.0, 0.25))]
    torch.testing.assert_close(lora.combine(adapters, base)[name], base[name] + 0.5 - 0.5)
    torch.testing.assert_close(lora.combine(adapters[:1], base)[name], base[name] + 0.5)


def test_dropout_inside_the_token_shift():
    """Not without an adapter or in evaluation, nor under ZeRO-3, where its result would be lost."""
    plain, adapted = Matrix(2, 3, bias=False), lora.LoRALinear(torch.nn.Parameter(torch.ones(3, 2)), 1, 1, dropout=0.3)
    assert dropout_of(adapted, plain) == [0.3, 0]
    assert dropout_of(adapted.eval()) == [0]
    adapted.train().lora_A.ds_tensor = torch.ones(1)  # as DeepSpeed's
    assert dropout_of(adapted) == [0]


def test_dropout_in_training_only(make_model):
    model = make_model()
    lora.inject(model, ["att"], 4, 8, dropout=0.5)
    randomise(model)
    model.train()
    assert not torch.equal(model(TOKENS)[0], model(TOKENS)[0])
    model.eval()
    assert torch.equal(model(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"n_embd": 24, "dim_att": 40, "dim_ffn": 52}, {"pre_ffn": True}])
def test_merged_matches_unmerged(make_model, sizes, dora):
    model = make_model(**sizes).eval()
    keys = set(model.state_dict())
    lora.inject(model, ["att", "ffn"], 4, 8, dora=dora)
    randomise(model)
    unmerged = model(TOKENS)[0]
    lora.merge(model)
    torch.testing.assert_close(model(TOKENS)[0], unmerged, rtol=1e-4, atol=1e-4)  # fp32 rounding of W + BA
    assert set(model.state_dict()) == keys


def test_invalid_parts_and_rank(make_model):
    with pytest.raises(
        ValueError, match=r"parts are any of att, ffn, all-linear, time, ln, state, att.key, .*; got emb"
    ):
        lora.inject(make_model(), ["att", "emb"], 4, 8)
    with pytest.raises(ValueError, match="got none"):
        lora.inject(make_model(), [], 4, 8)
    with pytest.raises(ValueError, match="at least 1; it is 0"):
        lora.inject(make_model(), ["att"], 0, 8)
    with pytest.raises(ValueError, match="no linear layer"):
        lora.inject(make_model(n_layer=1, pre_ffn=True), ["att"], 4, 8)


def test_frozen_matrices_in_bf16(make_model):
    model = make_model()
    lora.inject(model, ["att", "ln"], 4, 8)
    lora.mark_trainable(model, ["att", "ln"])
    lora.store_frozen(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        matrix = parameter.squeeze().dim() == 2 and ".lora_" not in name
        assert parameter.dtype == (torch.bfloat16 if matrix else torch.float32), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(TOKENS)[0].float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("parts", [["att"], ["att", "time"]])
def test_frozen_low_rank_matrices_in_bf16(parts):
    """Those of RWKV-7, unless they are trained. In bf16 they are multiplied in bf16 either way."""
    model = RWKV(VERSIONS["7"].Sizes(2, 64, 50, head_size=32))
    model.initialise(1e-2)
    lora.inject(model, parts, 4, 8)
    lora.mark_trainable(model, parts)
    names = {f"blocks.1.att.{kind}{i}" for kind in "wavg" for i in (1, 2)}
    with torch.no_grad():
        for name in names:  # the first are initialised to zero
            model.get_parameter(name).normal_(0, 0.1)
    lora.store_frozen(model, torch.bfloat16)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32 if "time" in parts else torch.bfloat16}
    assert model.blocks[1].att.r_k.dtype == model.blocks[1].att.w0.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(TOKENS)[0]
        for name in names:
            model.get_parameter(name).data = model.get_parameter(name).data.float()
        assert torch.equal(model(TOKENS)[0], found)


@pytest.mark.filterwarnings("ignore:(?s).*reference loop")  # no compiled kernels for fp64
@pytest.mark.parametrize("grad_cp", [False, True])
def test_dropout_gradients_match_finite_differences(make_model, grad_cp):
    """With a fixed dropout mask, the directional derivative equals the finite difference."""
    model = make_model().double()
    lora.inject(model, ["att", "ffn"], 4, 8, dropout=0.4)
    lora.mark_trainable(model, ["att", "ffn"])
    model.grad_cp = grad_cp
    randomise(model)
    model.double()

    def loss():
        torch.manual_seed(3)
        return model(TOKENS)[0].square().mean()

    loss().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, direction, strict=True))
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(trained, direction, strict=True):
                p += step * d
            losses.append(float(loss()))
    # central difference in fp64: its error is the third derivative
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


def test_launches():
    """On a GPU each of these is a kernel: matmuls, and casts of A, B and their gradients."""
    layer = lora.LoRALinear(torch.zeros(8, 6, dtype=torch.bfloat16), 2, 4.0)
    x = torch.zeros(3, 6, dtype=torch.bfloat16, requires_grad=True)
    with Launches() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    g = torch.zeros_like(y)
    with Launches() as backward:
        y.backward(g)
    assert sorted(forward.names) == ["_to_copy", "_to_copy", "addmm_", "mm", "mm"]
    assert sorted(backward.names) == ["_to_copy", "_to_copy", "addmm", "addmm", "addmm_", "mm", "mm"]
    assert layer.lora_B.grad.is_contiguous()


def test_saved_activations_are_rank_sized(make_model):
    layer = lora.LoRALinear(torch.nn.Parameter(torch.randn(24, 16)), 2, 4, dropout=0.5)
    x, saved = torch.randn(3, 5, 16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    # r elements per token, and no dropout mask
    assert [t.shape for t in saved if t.data_ptr() not in parameters] == [(15, 2)]
