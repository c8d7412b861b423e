"""The bf16 copy of a weight is always the cast of the present weight, and changes no result."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkv.kernels import bf16_copy
from rwkv.kernels.elementwise import native
from rwkv.kernels.head_loss import head_loss, log_probabilities
from rwkv.kernels.linear import Matrix, linear


def weight(rows=12, columns=20):
    return torch.nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)))


def kept(rows=12, columns=20):
    w = weight(rows, columns)
    bf16_copy.keep(w)
    return w


def assert_current(w):
    assert torch.equal(bf16_copy.cached(w, torch.bfloat16), w.detach().bfloat16())


def test_only_for_bf16():
    w = kept()
    assert bf16_copy.cached(w, torch.float32) is w
    assert bf16_copy.cached(w, torch.float16) is w
    assert bf16_copy.memory(weight()) is None
    assert_current(w)


def test_made_once():
    w = kept()
    first = bf16_copy.cached(w, torch.bfloat16)
    first[0, 0] = 7  # as no one else may
    assert bf16_copy.cached(w, torch.bfloat16)[0, 0] == 7
    assert not first.requires_grad


@torch.no_grad()
def _write(w):
    w.mul_(2)


@torch.no_grad()
def _load(w):
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight = w
    module.load_state_dict({"weight": torch.full_like(w, 3.0)})


def _replace(w):
    w.data = w.data * 2


def _replace_twice(w):
    """The second time with memory that may have the address of the first."""
    values = w.detach().clone()
    w.data = torch.zeros_like(w)
    w.data = values * 2


def _reshape(w):
    w.data = torch.ones(3, 5)


def _step(w):
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.1).step()


@pytest.mark.parametrize("change", [_write, _load, _replace, _replace_twice, _reshape, _step])
def test_made_again_after_a_change(change):
    w = kept()
    assert_current(w)
    change(w)
    assert_current(w)


def test_refresh_writes_in_place_whatever_the_version():
    """As after optimizers that write without a new version of the weight."""
    weights = [kept(), weight(), kept(3, 4)]
    before = [bf16_copy.cached(w, torch.bfloat16) for w in weights]
    for w in weights:
        w.data.mul_(3)
    bf16_copy.refresh(weights)
    for w, old in zip(weights, before, strict=True):
        assert bf16_copy.cached(w, torch.bfloat16) is old
    assert_current(weights[0])
    assert_current(weights[2])
    bf16_copy.refresh([weight()])


def test_not_copied_or_saved_with_the_weight():
    w = kept()
    assert_current(w)
    clone = copy.deepcopy(w)
    assert bf16_copy.memory(clone) is None or bf16_copy.memory(clone) is not bf16_copy.memory(w)
    layer = Matrix(20, 12, bias=False)
    layer.keep_bf16_copy()
    assert list(layer.state_dict()) == ["weight"]
    assert not hasattr(layer.state_dict()["weight"], "bf16_copy")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("operation", ["linear", "normed", "loss", "log-probabilities"])
def test_same_bits(operation, checkpointed):
    """Of outputs and gradients, with the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(2, 9, 20, generator=generator), torch.randint(12, (2, 9), generator=generator)
    mask = torch.ones(2, 9, dtype=torch.bool)

    def run(w, x):
        if operation == "linear":
            return linear(x, w)
        if operation == "normed":
            return linear(native.norm(x, torch.ones(20), torch.zeros(20), 1e-5), w)
        if operation == "loss":
            return head_loss(x, w, targets)
        return log_probabilities(x, w, targets, mask)

    found = []
    for w in (weight(), kept()):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(run, w, given, use_reentrant=False) if checkpointed else run(w, given)
        y.float().sin().sum().backward()
        assert w.grad.dtype == torch.float32
        found.append((y, given.grad, w.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert_current(w)


def test_weight_is_cast_once():
    """Not in every pass: the copy is what the backward pass saves and multiplies."""
    w, x = kept(), torch.randn(4, 20).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x, w)
    address = bf16_copy.cached(w, torch.bfloat16).data_ptr()
    assert address in {t.data_ptr() for t in saved}
    assert w.data_ptr() not in {t.data_ptr() for t in saved}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        y.sum().backward()
        linear(x, w)
    casts = [event for event in profiler.events() if event.name == "aten::_to_copy"]
    assert len(casts) == 1  # of the gradient to fp32
