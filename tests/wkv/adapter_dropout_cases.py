"""Dropout of adapters inside the token shift, and after it by an operation of its own. Every
function takes plain values, so that another process can run it by name (fake_gpu.py).
"""

import contextlib
from unittest import mock

import shift_cases
import torch
from fused_cases import FP32, normal

from rwkv.adapters import lora
from rwkv.kernels.elementwise import native, shift
from rwkv.kernels.elementwise.recompute import recompute_of
from rwkv.kernels.elementwise.seeds import new_seed
from rwkv.models import RWKV, layers
from rwkv.models.version import VERSIONS


def mixed(dtype, length, channels, drops, reset, inside, device="cpu"):
    """The outputs of mix, their dropout, and its recomputation. `inside`: dropout inside of mix."""
    x, last = normal((2, length, channels), dtype, 0), normal((2, channels), dtype, 1)
    starts = (normal((2, length), FP32, 2) > 0.5).to(device) if reset else None
    weights = [torch.rand(channels, generator=torch.Generator().manual_seed(i)).to(device) for i in range(len(drops))]
    torch.manual_seed(7)
    initial = torch.zeros_like(last).to(device)
    outputs = native.mix(x.to(device), last.to(device), starts, weights, initial, drops if inside else ())
    found = []
    for y, p in zip(outputs, drops, strict=True):
        dropped, recompute = native.take_dropped(y), recompute_of(y)
        assert (dropped is not None) == bool(inside and p)
        assert native.take_dropped(y) is None
        if dropped:
            again = dropped.recompute(dropped.seed, *recompute.inputs)
            found += [dropped.value.cpu(), again.cpu()]
        elif p:
            found += 2 * [native.dropout(y, new_seed(y.device), p).cpu()]
        found.append(y.detach().cpu())
    return found


def shifted(run, dtype, shape, drops, resets, device="cpu"):
    """The dropout of the mixtures of RWKV-6 for a shape (B, T, D, mixtures, rank), by the kernels
    `run`: in the same pass, recomputed, and by an operation of its own.
    """
    x, last, *weights, low, up = (t.to(device) for t in shift_cases.inputs(*shape, dtype))
    reset = torch.rand(shape[:2], generator=torch.Generator().manual_seed(3)) < 0.2
    given = x, last, reset.to(device) if resets else None, weights, low, up
    torch.manual_seed(7)
    outputs, found = shift.shift(run, *given, drops), []
    torch.manual_seed(7)
    for y, plain, p in zip(outputs, shift.shift(run, *given), drops, strict=True):
        assert torch.equal(y, plain)
        dropped, recompute = native.take_dropped(y), recompute_of(y)
        assert (dropped is not None) == (p > 0)
        if dropped:
            expected = run.dropout(plain.detach(), new_seed(y.device), p)
            found.append((dropped.value, dropped.recompute(dropped.seed, *recompute.inputs), expected))
    return found


def step(version, parts, dtype, grad_cp, inside, device="cpu", kernels=True):
    """The logits of a model with adapters on these parts, the adapters' gradients, and the next
    random number. `inside`: dropout inside of the token shift. `kernels`: RWKV-6 has its token
    shift by kernels.
    """
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "vocab_size": 50, **({} if version == "4" else {"head_size": 16})}
    model = RWKV(VERSIONS[version].Sizes(**sizes))
    model.initialise(emb_scale=1e-2)
    lora.inject(model, parts, 4, 8, dropout=0.4)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    lora.mark_trainable(model, parts)
    lora.store_frozen(model, dtype)
    model.grad_cp = grad_cp
    model.to(device).train()
    with contextlib.ExitStack() as stack:
        if not inside:
            stack.enter_context(mock.patch.object(layers, "_sharded", return_value=True))  # as if under ZeRO-3
        if kernels:
            stack.enter_context(mock.patch.object(shift, "kernels", native._kernels))
        logits = model(torch.arange(66, device=device).view(2, 33) % 50)[0]
        logits.float().square().mean().backward()
    gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
    return [logits.detach().cpu(), *gradients, torch.rand(1)]
