"""What the compiled operators with a matrix-valued state by head (WKV6, WKV7) have in common:
accuracy, states and resets, gradients, and errors.
"""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from head_cases import WKV6, WKV7, assert_half_is_rounded_fp32, outputs_and_gradients, starts, states

from rwkv.kernels import build, load
from rwkv.wkv.heads import empty_state
from rwkv.wkv.wkv6 import native as native6
from rwkv.wkv.wkv7 import native as native7


@pytest.fixture(params=[WKV6, WKV7], ids=lambda op: op.name)
def op(request):
    return request.param


@pytest.fixture(params=["cpu", "reference"])
def run(op, request):
    """The operator by one implementation."""
    return lambda *arguments, **named: op.function(*arguments, **named, impl=request.param)


def pieces(op, tensors, cuts):
    """The tensors of each range of tokens between two cuts."""
    for i, j in itertools.pairwise(cuts):
        yield [x[:, i:j] for x in tensors[: op.by_token]] + list(tensors[op.by_token :])


@pytest.mark.parametrize("size", [16, 48, 64, 256])
def test_vector_widths_match_reference(op, vectors, size):
    op.check(op.inputs(2, 19, 2, size), states(2, 2, size), starts(2, 19))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_rounded_fp32(op, dtype):
    assert_half_is_rounded_fp32(op.cpu, dtype, op.inputs(2, 19, 2, 64), states(2, 2, 64))


def test_chunks_match_full_sequence(op, run):
    tensors, first, reset = op.inputs(2, 70, 2, 32), states(2, 2, 32), starts(2, 70)
    whole, last = run(*tensors, first, reset)
    for cuts in (range(71), (0, 33, 70), (0, 69, 70)):
        state, chunks = first, []
        for part, (i, j) in zip(pieces(op, tensors, cuts), itertools.pairwise(cuts), strict=True):
            y, state = run(*part, state, reset[:, i:j], initial=first)
            chunks.append(y)
        # the same operations, but for the order of sums in WKV6's outputs
        torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-6, atol=op.atol)
        torch.testing.assert_close(state, last, rtol=1e-6, atol=1e-6)


def test_gradient_through_carried_state(op):
    length = 3 * op.interval // 2
    tensors = [x.requires_grad_() for x in op.inputs(2, length, 2, 32)]
    whole = torch.autograd.grad(op.cpu(*tensors)[0].sin().sum(), tensors)
    parts, state = [], None
    for part in pieces(op, tensors, (0, op.interval + 7, length)):
        y, state = op.cpu(*part, state=state)
        parts.append(y)
    chunks = torch.autograd.grad(torch.cat(parts, 1).sin().sum(), tensors)
    for ours, theirs in zip(chunks, whole, strict=True):
        # sums over tokens in another order; states are recomputed from other tokens
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=10 * op.atol)


def test_reset_returns_to_the_given_state(op, run):
    """Packed documents match separate documents, and the initial state's gradient is the sum over
    documents.
    """
    reset = torch.zeros(2, 40, dtype=torch.bool)
    reset[0, 21] = reset[1, 0] = reset[1, 20] = reset[1, 39] = True
    packed, separate = (
        [x.clone().requires_grad_() for x in (*op.inputs(2, 40, 2, 32), states(2, 2, 32))] for _ in range(2)
    )
    y, _ = run(*packed, reset)
    expected = []
    for row, cuts in enumerate(((0, 21, 40), (0, 20, 39, 40))):
        *tensors, first = separate
        one_row = [x[row, None] for x in tensors[: op.by_token]] + tensors[op.by_token :]
        parts = [run(*part, first[row, None])[0] for part in pieces(op, one_row, cuts)]
        expected.append(torch.cat(parts, 1))
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-5, atol=op.atol)
    gradients = (torch.autograd.grad(out.sin().sum(), x) for out, x in ((y, packed), (torch.cat(expected), separate)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # different summation order


@pytest.mark.parametrize("length", [1, 17])
def test_reset_at_the_ends_and_everywhere(op, length):
    check_resets_at_the_ends_and_everywhere(op.check, op, length)


def check_resets_at_the_ends_and_everywhere(check, op, length):
    for places in ([0], [-1], slice(None)):
        reset = torch.zeros(3, length, dtype=torch.bool)
        reset[:, places] = True
        check(op.inputs(3, length, 1, 32), states(3, 1, 32), reset, states(3, 1, 32, 4))


def test_no_gradient_across_documents(op, run):
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    leaves = [x.requires_grad_() for x in (*op.inputs(1, 40, 2, 16), states(1, 2, 16))]
    y, _ = run(*leaves, reset, initial=empty_state(1, 2, 16))
    gy = torch.ones_like(y)
    gy[:, 21:] = float("nan")
    *gradients, gstate = torch.autograd.grad(y, leaves, gy)
    assert all(g[:, :21].isfinite().all() for g in gradients[: op.by_token])
    assert gstate.isfinite().all()
    assert gradients[2][:, 21:].isnan().any()


def test_gradient_of_single_output(op):
    tensors = op.inputs(2, 20, 2, 32)
    for pick in (lambda y, last: y.sin().sum(), lambda y, last: last.sin().sum()):
        results = []
        for run in (op.cpu, op.loop):
            leaves = [x.clone().requires_grad_() for x in (*tensors, states(2, 2, 32))]
            out = pick(*run(*leaves[:-1], state=leaves[-1]))
            results.append(torch.autograd.grad(out, leaves, allow_unused=True))
        for ours, theirs in zip(*results, strict=True):
            expected = torch.zeros_like(ours) if theirs is None else theirs
            # fp32 rounding of sums over 20 tokens
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_nan_propagates(op):
    for i in range(op.by_token):
        tensors = op.inputs(1, 20, 1, 64)
        tensors[i][0, 3, 0, 2] = float("nan")
        fast, slow = (run(*tensors)[0].isnan() for run in (op.cpu, op.loop))
        assert torch.equal(fast, slow), i


def test_long_sequence(op):
    op.check(op.inputs(1, 1025, 1, 16))


def test_independent_of_threads(op):
    length = op.interval + 24
    arguments = op.inputs(3, length, 3, 32), states(3, 3, 32), starts(3, length)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs_and_gradients(op.cpu, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_strided_inputs(op):
    tensors = op.inputs(2, 9, 3, 16)
    for i in range(op.by_token):
        tensors[i] = tensors[i].transpose(1, 2).contiguous().transpose(1, 2)
        assert not tensors[i].is_contiguous()
    torch.testing.assert_close(op.cpu(*tensors)[0], op.loop(*tensors)[0], rtol=1e-4, atol=1e-5)  # fp32 rounding


def test_empty_state_is_no_state(op):
    tensors = op.inputs(2, 10, 2, 16)
    assert torch.equal(op.cpu(*tensors)[0], op.cpu(*tensors, state=empty_state(2, 2, 16))[0])


def test_no_second_derivatives(op):
    tensors = [x.requires_grad_() for x in op.inputs(1, 3, 1, 16)]
    with pytest.raises(RuntimeError, match=f'{op.name}: .*no second derivatives.*impl="reference"'):
        torch.autograd.grad(op.cpu(*tensors)[0].sum(), tensors[0], create_graph=True)


def test_invalid_arguments(op):
    r, w, k, v, *others = tensors = op.inputs(2, 5, 2, 16)
    last = "u" if op is WKV6 else "b"
    for message, arguments in {
        r"k must be \[2, 5, 2, 16\] .* got \[2, 4, 2, 16\]": (r, w, k[:, :4], v, *others),
        r"state must be \[2, 2, 16, 16\]": (*tensors, states(1, 2, 16)),
        r"reset must be \[2, 5\]": (*tensors, None, starts(2, 4)),
        "reset must be bool": (*tensors, None, starts(2, 5).int()),
        r"r must be \[B, T, H, N\]": (r[0], w, k, v, *others),
        "multiple of 16, at most 256; got 8": [x[..., :8] for x in tensors],
        "v must have r's dtype": (r, w, k, v.bfloat16(), *others),
        f"{last} is on meta and r on cpu": (*tensors[:-1], tensors[-1].to("meta")),
        "must be floating-point; got torch.int64": [x.long() for x in tensors],
    }.items():
        with pytest.raises(ValueError, match=message):
            op.function(*arguments)
    with pytest.raises(ValueError, match=rf"not one of auto, {op.implementations}$"):
        op.function(*tensors, impl="fast")


def test_auto_selects_cpu_kernels(op, monkeypatch):
    monkeypatch.setattr(op.reference, op.name, lambda *_: pytest.fail("auto fell back to the reference"))
    op.function(*op.inputs(1, 3, 1, 16))


def test_auto_fallback_warning(op, monkeypatch):
    monkeypatch.setattr(load, "why_unavailable", lambda: "it is not compiled for torch 0.0; run: make kernels")
    with pytest.warns(UserWarning, match=r"unavailable(?s:.)*cpu: it is not compiled for torch 0.0; run: make kernels"):
        y, _ = op.function(*op.inputs(1, 3, 1, 16))
    assert y.shape == (1, 3, 1, 16)


@pytest.mark.parametrize("size", [16, 64, 80, 128, 144, 256])
def test_workspace_of_the_cuda_kernels(size):
    """The sizes in Python, for the memory estimate, are those of the kernels' arguments."""
    constants = {}
    for name in ("wkv6", "wkv7"):
        text = (build.SOURCES / name / f"{name}_args.h").read_text(encoding="utf-8")
        constants |= {key: int(value) for key, value in re.findall(r"\b(WKV[67]_\w+) = (\d+)", text)}
    c = SimpleNamespace(**constants)
    assert native6.SAVE_INTERVAL == c.WKV6_SAVE_INTERVAL
    states = c.WKV6_SAVE_INTERVAL // c.WKV6_STATES - 1
    blocks = 1 if size <= 64 else size // 16
    assert native6.workspace_bytes(5, size) == 4 * states * c.WKV6_TILE * 32 * c.WKV6_WARPS * 5 * blocks
    width = 64 if size <= 64 else 128 if size <= 128 else 256
    rows = c.WKV7_WARP_ROWS * (c.WKV7_WARPS if size <= 64 else c.WKV7_WIDE_WARPS)
    states = c.WKV7_SAVE_INTERVAL // (256 // width) - 1
    assert native7.workspace_bytes(5, size) == 4 * states * width * rows * 5 * -(-size // rows)
