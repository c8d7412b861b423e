"""One-pass Adam matches torch's Adam and AdamW for every vector width, and their states are
interchangeable.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv.config import TrainConfig
from rwkv.kernels import load
from rwkv.train.loop import adam, optimizer
from rwkv.train.runtime import fused_adam

WIDTHS = st.sampled_from(["baseline", "avx2", "avx512", "avx512_bf16"])
SHAPES = st.sampled_from([(), (1,), (3,), (31,), (32, 1), (1, 1, 33), (5, 13), (257,), (130, 131), (0,)])


@pytest.fixture(autouse=True)
def compiled_kernels():
    """Require the compiled kernels; restore the widest vectors after a test."""
    assert load.why_unavailable() is None
    yield
    torch.ops.rwkv.cpu_vectors("")


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(shape=(5, 13), seed=0):
    p = torch.nn.Parameter(normal(shape, seed))
    p.grad = normal(shape, seed + 1)
    return p


def one_pass(p, decoupled=False, **options):
    return adam.FusedAdam([{"params": [p]}], decoupled, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def torch_adam(p, decoupled=False, **options):
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)([p], **{"lr": 1e-2, "weight_decay": 0.1, **options})


@settings(max_examples=200, deadline=None)
@given(
    width=WIDTHS, shape=SHAPES, decoupled=st.booleans(), lr=st.sampled_from([0.0, 1e-6, 1e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.99), (0.9, 0.999), (0.0, 0.95), (0.5, 0.0)]), eps=st.sampled_from([1e-10, 1e-8, 1e-2]),
    decay=st.sampled_from([0.0, 1e-3, 0.5]), step=st.sampled_from([0, 1, 9, 1000, 10**6]), clip=st.sampled_from([1.0, 1e-3, 0.7]),
    size=st.sampled_from([1.0, 1e-4, 1e3]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_step_matches_torch_fp64(width, shape, decoupled, lr, betas, eps, decay, step, clip, size, seed):
    torch.ops.rwkv.cpu_vectors(width)
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
    p, g, m, v = (normal(shape, seed + i) * scale for i, scale in enumerate((1, size, size / 3, size)))
    v = v**2
    count = torch.tensor(float(step))
    ours, truth = torch.nn.Parameter(p.clone()), torch.nn.Parameter(p.double())
    ours.grad, truth.grad = g.clone(), g.double() * clip
    one_pass_opt, torch_opt = one_pass(ours, decoupled, **options), torch_adam(truth, decoupled, **options)
    one_pass_opt.state[ours] = {"step": count.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    torch_opt.state[truth] = {"step": count.clone(), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    one_pass_opt.clip = clip
    one_pass_opt.step()
    torch_opt.step()
    assert torch.equal(ours.grad, g)  # the gradient is clipped within the pass, not in place
    new, expected = one_pass_opt.state[ours], torch_opt.state[truth]
    assert float(new["step"]) == step + 1

    # A few fp32 roundings of every term (not of the sum, as terms may cancel). Denormals may be
    # flushed to 0.
    rounding, smallest = 2.0**-24, 1e-37
    gradient = clip * g.double().abs() + (0 if decoupled else decay) * p.double().abs()
    square = betas[1] * v.double() + (1 - betas[1]) * gradient**2
    assert bool(
        ((new["exp_avg"] - expected["exp_avg"]).abs() <= 6 * rounding * (m.double().abs() + gradient) + smallest).all()
    )
    assert bool(((new["exp_avg_sq"] - expected["exp_avg_sq"]).abs() <= 8 * rounding * square + smallest).all())
    root, correction = (1 - betas[1] ** (step + 1)) ** 0.5, 1 - betas[0] ** (step + 1)
    denominator = expected["exp_avg_sq"].sqrt() / root + eps
    cancellation = 1 + square / expected["exp_avg_sq"].clamp_min(smallest)  # how far the terms of v cancel
    update = lr / correction * (m.double().abs() + gradient) / denominator * cancellation
    assert bool(((ours - truth).abs() <= rounding * (3 * p.double().abs() + 16 * update) + smallest).all())


@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
def test_thirty_steps_match_torch(decoupled):
    ours, theirs = parameter(), parameter()
    one_pass_opt, torch_opt = one_pass(ours, decoupled), torch_adam(theirs, decoupled)
    for step in range(30):
        ours.grad, theirs.grad = (normal((13, 5), 100 + step).t() for _ in range(2))  # not contiguous
        for group in (one_pass_opt.param_groups[0], torch_opt.param_groups[0]):
            group["lr"] = 1e-2 / (1 + step)
        one_pass_opt.clip = 0.5
        theirs.grad.mul_(0.5)
        one_pass_opt.step()
        torch_opt.step()
        assert one_pass_opt.clip == 1
    # fp32 rounding of thirty updates of at most 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoupled", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("first", [one_pass, torch_adam], ids=["from ours", "from torch's"])
def test_state_interchangeable_with_torch(decoupled, first):
    """For example when a run of an older version is resumed, or if the kernels are not compiled."""

    def run(makers):
        p, saved = parameter(), None
        for step, make in enumerate(makers):
            opt = make(p, decoupled)
            if saved:
                opt.load_state_dict(saved)
            p.grad = normal(p.shape, step)
            opt.step()
            saved = copy.deepcopy(opt.state_dict())
        return p.detach(), saved

    other = torch_adam if first is one_pass else one_pass
    (switched, saved), (unchanged, expected) = run([first, first, other, other]), run([first] * 4)
    torch.testing.assert_close(switched, unchanged, rtol=1e-6, atol=1e-7)  # fp32 rounding of four steps
    assert saved["state"].keys() == expected["state"].keys()
    for name, value in expected["state"][0].items():
        assert (saved["state"][0][name].dtype, saved["state"][0][name].shape) == (value.dtype, value.shape)
        torch.testing.assert_close(saved["state"][0][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_copy_is_rounded_as_by_torch(width):
    """Ties to even, also denormals, numbers that become infinite and the tail of a block; the
    weights are the same as without a copy.
    """
    torch.ops.rwkv.cpu_vectors(width)
    bits = torch.arange(-(2**31), 2**31, 2**32 // 40009 | 1, dtype=torch.int64).to(torch.int32)
    ties = torch.arange(-100, 100, dtype=torch.int32) * 0x10000 + 0x8000 + 0x3F800000
    values = torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor([0.0, -0.0, 1e-40, 3.4e38])])
    found = []
    for copied in (None, torch.zeros(len(values), dtype=torch.bfloat16)):
        p, zeros = values.clone(), torch.zeros_like(values)
        # a step of size 0: the weight stays as it is
        torch.ops.rwkv.adam(p, zeros, zeros.clone(), zeros.clone(), 1.0, 0.0, 0.9, 0.99, 1e-8, 0.0, True, 1.0, copied)
        found.append(p)
    finite = ~found[0].isnan()
    assert torch.equal(found[0][finite], found[1][finite])
    assert torch.equal(copied[finite].view(torch.int16), p[finite].bfloat16().view(torch.int16))
    assert bool(copied[~finite].isnan().all())


def test_copy_must_match():
    for wrong in (torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="the copy must be a contiguous BFloat16 tensor of sizes"):
            torch.ops.rwkv.adam(*(normal((3,), i) for i in range(4)), 1.0, 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1.0, wrong)


def test_unsupported_options():
    for option in ({"amsgrad": True}, {"maximize": True}):
        with pytest.raises(ValueError, match="does not support amsgrad or maximize"):
            one_pass(parameter(), **option).step()


def test_invalid_state():
    p = parameter()
    opt = one_pass(p)
    opt.step()
    opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].double()
    with pytest.raises(RuntimeError, match="exp_avg must be a contiguous Float tensor"):
        opt.step()
    with pytest.raises(RuntimeError, match="Adam steps count from 1"):
        torch.ops.rwkv.adam(*(normal((3,), i) for i in range(4)), 0.0, 0.1, 0.9, 0.99, 1e-8, 0.0, False, 1.0)


def test_closure_and_missing_gradient():
    p, idle = parameter(), torch.nn.Parameter(torch.ones(3))
    opt = adam.FusedAdam([{"params": [p, idle]}], False, lr=0.1)

    def closure():
        p.grad = None
        loss = (p**2).sum()
        loss.backward()
        return loss.detach()

    before = p.detach().clone()
    assert opt.step(closure) == (before**2).sum()
    assert set(opt.state) == {p}
    torch.testing.assert_close(p.detach(), before - 0.1 * before.sign())  # Adam's first step has size lr


@pytest.mark.parametrize("count", [0, 1, 5])
def test_gradient_norm(count):
    parameters = [parameter(seed=2 * i) for i in range(count)]
    expected = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    torch.testing.assert_close(fused_adam.total_norm([p.grad for p in parameters]), expected)


def test_one_pass_adam_selected(make_model, monkeypatch):
    for decay, decoupled in ((0.0, False), (0.1, True)):
        opt = optimizer.make(make_model(), TrainConfig(weight_decay=decay))
        assert (type(opt), opt.decoupled) == (adam.FusedAdam, decoupled)
    assert type(optimizer.make(make_model().bfloat16(), TrainConfig())) is torch.optim.Adam
    monkeypatch.setattr(adam.load, "why_unavailable", lambda: "not compiled")
    assert type(optimizer.make(make_model(), TrainConfig())) is torch.optim.Adam
