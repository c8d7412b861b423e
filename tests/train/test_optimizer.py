"""Layerwise rates and what decays."""

import torch

from rwkv.config import TrainConfig
from rwkv.train import optimizer


def scales(model, **flags):
    return {name: (g["lr_scale"], g["decays"]) for g in optimizer.groups(model, TrainConfig(**flags)) for name in g["names"]}


def test_layerwise_rates_are_upstreams(make_model):
    model = make_model()
    found = scales(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, (scale, decays) in found.items():
        assert scale == (2 if "time_decay" in name else 3 if "time_first" in name else 1)
        assert not decays


def test_layerwise_rates_can_be_left_out(make_model):
    assert set(scales(make_model(), layerwise_lr=0).values()) == {(1.0, False)}


def test_only_matrices_decay(make_model):
    for name, (_, decays) in scales(make_model(), weight_decay=0.1).items():
        assert decays == (
            name in ("emb.weight", "head.weight") or name.endswith((".key.weight", ".value.weight", ".receptance.weight", ".output.weight"))
        )


def test_frozen_parameters_are_left_out(make_model):
    model = make_model()
    model.emb.weight.requires_grad_(False)
    assert "emb.weight" not in scales(model)


def test_rates_and_decays_reach_their_groups(make_model):
    for decay, kind in ((0.0, torch.optim.Adam), (0.1, torch.optim.AdamW)):
        made = optimizer.make(make_model(), TrainConfig(weight_decay=decay))
        assert type(made) is kind
        optimizer.set_rates(made, 1e-3, decay / 2)
        for group in made.param_groups:
            assert group["lr"] == 1e-3 * group["lr_scale"]
            assert group["weight_decay"] == (decay / 2 if group["decays"] else 0)
            assert (group["betas"], group["eps"]) == ((0.9, 0.99), 1e-8)
