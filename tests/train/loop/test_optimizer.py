"""Layerwise learning rates, weight decay and skipped steps."""

import pytest
import torch

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.train.loop import optimizer
from rwkv.train.runtime import fused_adam, zero
from tests.train import fused_adam_on_cpu


def scales(model, **flags):
    return {
        name: (g["lr_scale"], g["decays"]) for g in optimizer.groups(model, TrainConfig(**flags)) for name in g["names"]
    }


def test_layerwise_lr_matches_upstream(make_model):
    model = make_model()
    found = scales(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (scale, decays) in found.items():
        assert scale == (2 if "time_decay" in name else 3 if "time_first" in name else 1)
        assert not decays


def test_layerwise_lr_off(make_model):
    assert set(scales(make_model(), layerwise_lr=0).values()) == {(1.0, False)}


def test_weight_decay_on_matrices_only(make_model):
    for name, (_, decays) in scales(make_model(), weight_decay=0.1).items():
        assert decays == (
            name in ("emb.weight", "head.weight")
            or name.endswith((".key.weight", ".value.weight", ".receptance.weight", ".output.weight"))
        )


def test_frozen_parameters_excluded(make_model):
    model = make_model()
    model.emb.weight.requires_grad_(False)
    assert "emb.weight" not in scales(model)


def test_rates_and_decay_per_group(make_model):
    for decay in (0.0, 0.1):
        opt = optimizer.make(make_model(), TrainConfig(weight_decay=decay))
        optimizer.set_rates(opt, 1e-3, decay / 2)
        for group in opt.param_groups:
            assert group["lr"] == 1e-3 * group["lr_scale"]
            assert group["weight_decay"] == (decay / 2 if group["decays"] else 0)
            assert (group["betas"], group["eps"]) == ((0.9, 0.99), 1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fp16_overflow_skips_step_on_device(make_model, monkeypatch, decay):
    """As called by torch's GradScaler, which is active on GPUs only."""
    fused_adam_on_cpu.use_on_cpu(monkeypatch)
    model = make_model()
    opt, scaler = optimizer.make(model, TrainConfig(weight_decay=decay)), fused_adam.grad_scaler()(enabled=False)
    optimizer.set_rates(opt, 1e-3, decay)
    shapes, step = [], opt.step
    opt.step = lambda *arguments, **keywords: (shapes.append(opt.found_inf.shape), step(*arguments, **keywords))[1]
    before = [p.detach().clone() for p in model.parameters()]
    for found, steps in ((0.0, 1), (1.0, 1), (0.0, 2)):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("inf") if found else 1.0)
        scaler._maybe_opt_step(opt, {"found_inf_per_device": {torch.device("cpu"): torch.tensor([found])}})
        same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if found else not any(same)
        assert {int(state["step"]) for state in opt.state.values()} == {steps}
        before = [p.detach().clone() for p in model.parameters()]
    assert opt.found_inf is None
    # with other shapes torch 1.13.1 would launch one kernel per parameter to subtract found_inf
    # from the steps
    assert set(shapes) == {state["step"].shape for state in opt.state.values()}


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_adam_formula(found_inf, decay):
    """The formula that replaces torch 1.13.1's fused Adam in tests, against torch's Adam, and the
    fused CPU kernel of torch 2.
    """

    def tensors():
        torch.manual_seed(0)
        p, g, m, v = ([torch.randn(n) for n in (3, 70)] for _ in range(4))
        return p, g, m, [x.square() for x in v], [], [torch.tensor(5.0) for _ in range(2)]

    rates = {
        "lr": 1e-2,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": decay,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    flag = None if found_inf is None else torch.tensor(found_inf)
    ours = tensors()
    fused_adam_on_cpu.formula(*ours, **rates, grad_scale=None, found_inf=flag)
    if found_inf:
        theirs = tensors()
    elif compat.stack() == "cu117":
        theirs = tensors()
        opt = torch.optim.Adam(
            [torch.nn.Parameter(x) for x in theirs[0]], lr=1e-2, betas=(0.9, 0.99), weight_decay=decay
        )
        for x, g, m, v in zip(opt.param_groups[0]["params"], *theirs[1:4], strict=True):
            x.grad, opt.state[x] = g, {"step": torch.tensor(4.0), "exp_avg": m, "exp_avg_sq": v}
        opt.step()
    else:
        theirs = tensors()
        torch._fused_adam_(*theirs, **rates, grad_scale=None, found_inf=flag)
    for mine, right in zip(ours[:1] + ours[2:4], theirs[:1] + theirs[2:4], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_restored_step_device(fused, place):
    """The step count is on the GPU for fused Adam only. The meta device stands for a GPU."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    opt = torch.optim.Adam([{"params": [parameter], "names": ["p"]}])
    opt.param_groups[0]["fused"] = fused
    zero.restore(
        {"p": parameter},
        opt,
        lambda name: {
            "weight": torch.zeros(3),
            "step": torch.tensor(4.0),
            "exp_avg": torch.zeros(3),
            "exp_avg_sq": torch.zeros(3),
        },
        {},
    )
    assert opt.state[parameter]["step"].device.type == place
    assert opt.state[parameter]["step"].shape == (fused_adam.like_step(torch.zeros(1)).shape if fused else ())
    assert opt.state[parameter]["exp_avg"].device.type == "meta"
