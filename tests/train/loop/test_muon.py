"""Muon's arithmetic: against torch.optim.Muon, AdamW and the iteration in float64."""

import pytest
import torch

from rwkv.config import TrainConfig
from rwkv.kernels import adamw
from rwkv.models.version import VERSIONS
from rwkv.train.loop import muon, optimizer

SHAPES = [(48, 48), (96, 24), (24, 96)]


def iteration(x):
    """The published iteration, in float64."""
    x = x.double()
    wide = x.t() if x.shape[0] > x.shape[1] else x
    y = wide / wide.norm()
    for _ in range(5):
        a = y @ y.t()
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return y.t() if x.shape[0] > x.shape[1] else y


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonal_matches_float64(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = iteration(x)
    assert relative(muon.orthogonal(x), expected) < 1e-4  # measured 2e-6; the iteration amplifies rounding
    # bf16 has 8 bits, and rounding adds up over 15 matmuls; measured 0.01
    assert relative(muon.orthogonal(x.bfloat16()), expected) < 0.03


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values(shape):
    """Between 1 and 1/50 before, 0.68 to 1.14 after; the directions stay."""
    generator = torch.Generator().manual_seed(2)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    s = torch.logspace(0, -1.5, min(shape))
    after = u.t() @ muon.orthogonal(u * s @ v) @ v.t()
    values = torch.diagonal(after)
    assert 0.68 < float(values.min()) < float(values.max()) < 1.14
    assert float((after - torch.diag(values)).abs().max()) < 1e-4  # rounding


def test_zero_gradient():
    assert bool((muon.orthogonal(torch.zeros(3, 5)) == 0).all())


def steps(opt, parameters, gradients):
    for g in gradients:
        for p in parameters:
            p.grad = g.clone()
        opt.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 1.13 has no Muon")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_match_torch(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    initial = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(initial.clone()) for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1}
    groups = [{"params": [ours], "names": ["blocks.0.att.key.weight"]}]
    mine = muon.Muon(groups, dtype, betas=(0.9, 0.99), eps=1e-8, **options)
    reference = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **options)
    gradients = [torch.randn(shape, generator=generator) for _ in range(4)]
    steps(mine, [ours], gradients)
    steps(reference, [theirs], gradients)
    # torch's iteration is in bf16; see test_orthogonal_matches_float64
    assert relative(ours.detach() - initial, (theirs.detach() - initial).double()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updates_match_formula(dtype):
    """On both stacks: momentum, scale, weight decay."""
    generator = torch.Generator().manual_seed(4)
    initial = torch.randn(96, 24, generator=generator)
    p = torch.nn.Parameter(initial.clone())
    groups = [{"params": [p], "names": ["blocks.0.ffn.key.weight"], "weight_decay": 0.1}]
    gradients = [torch.randn(96, 24, generator=generator) for _ in range(4)]
    steps(muon.Muon(groups, dtype, lr=0.01, betas=(0.9, 0.99), eps=1e-8), [p], gradients)
    w, m = initial.double(), torch.zeros(96, 24, dtype=torch.float64)
    for g in gradients:
        m = 0.95 * m + 0.05 * g
        w = w * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 96**0.5 * iteration(0.95 * m + 0.05 * g)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03  # see test_orthogonal_matches_float64
    assert relative(p.detach() - initial, w - initial) < tolerance


def test_other_parameters_follow_adamw():
    generator = torch.Generator().manual_seed(5)
    initial = torch.randn(70, 64, generator=generator)  # large enough for 8-bit moments
    ours, theirs = (torch.nn.Parameter(initial.clone()) for _ in range(2))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    mine = muon.Muon([{"params": [ours], "names": ["head.weight"]}], torch.float32, **options)
    gradients = [torch.randn(70, 64, generator=generator) for _ in range(4)]
    assert initial.numel() >= adamw.MIN_QUANTISED
    steps(mine, [ours], gradients)
    steps(torch.optim.AdamW([theirs], **options), [theirs], gradients)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # rounding in another order


def test_root_mean_square_is_that_of_adamw():
    """0.2, whatever the shape."""
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.zeros(shape))
        groups = [{"params": [p], "names": ["blocks.0.att.key.weight"]}]
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(6))
        steps(muon.Muon(groups, torch.float32, lr=1.0, betas=(0.9, 0.99), eps=1e-8), [p], [gradient])
        assert float(p.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.3)  # S' is 0.68 to 1.14


@pytest.mark.parametrize("version", list(VERSIONS))
def test_linear_layers_of_blocks_only(make_model, version):
    model = make_model(version=version)
    opt = optimizer.make(model, TrainConfig(optimizer="muon", weight_decay=0.1))
    optimizer.set_rates(opt, 1e-3, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    found = {name for name, p in model.named_parameters() if "momentum" in opt.state[p]}
    linear = {f"{name}.weight" for name, part in model.blocks.named_modules(prefix="blocks") if hasattr(part, "weight")}
    assert found == {name for name in linear if before[name].dim() == 2}
    assert not {"emb.weight", "head.weight"} & found
    assert {g["lr_scale"] for g in opt.param_groups} == ({1.0, 2.0, 3.0} if version == "4" else {1.0, 2.0})
    for group in opt.param_groups:  # the learning rates and weight decay of the groups are used
        for p, name in zip(group["params"], group["names"], strict=True):
            if name not in found:
                expected = before[name] * (1 - group["lr"] * group["weight_decay"]) - group["lr"]
                torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)
