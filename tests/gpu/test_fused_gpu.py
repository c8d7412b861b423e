"""The fused CUDA kernels on a GPU: accuracy against fp64, agreement with torch's operations,
determinism, no host synchronisation, memory.
"""

import adamw_cases
import fused_cases as cases
import pytest
import torch
from adapter_dropout_cases import mixed
from fused_cases import BF16, FP16, FP32, GPU_STREAMS, normal

from rwkv.kernels import adamw, gpu
from rwkv.kernels.elementwise import native
from rwkv.kernels.head_loss import head_loss
from rwkv.models import RWKV
from rwkv.models.v4 import Sizes
from rwkv.train.runtime import fused_adam

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]


def test_compiled_kernels_in_use():
    assert isinstance(native._kernels(torch.zeros(1, device="cuda")), gpu.CudaKernels)


@pytest.mark.parametrize("stream", GPU_STREAMS, ids=str)
@pytest.mark.parametrize("channels", [10, 33, 768, 5120, 8200])
def test_norm(stream, channels):
    for rows in (1, 19, 1000):
        cases.norm(stream, rows, channels, channels, "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("channels", [1, 33, 768, 5120])
@pytest.mark.parametrize("reset", [False, True])
def test_mix(dtype, channels, reset):
    for length in (1, 2, 17, 127):
        for count in (1, 2, 3):
            cases.mix(dtype, length, channels, count, reset, channels + length, "cuda")


@pytest.mark.parametrize("stream", GPU_STREAMS, ids=str)
def test_gates_and_squared_relu(stream):
    for count in (1, 33, 4096):
        for scale in (1, 30, 300):
            cases.gates(stream, count, scale, count, "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_dropout_mask_matches_cpu(dtype):
    for count in (5003, 5000):
        cases.dropout(dtype, count, "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("channels", [33, 768])
def test_mix_drops_the_same_elements(dtype, channels):
    for drops in ((0.01,), (0.4, 0, 0.9)):
        inside, separate = (mixed(dtype, 127, channels, drops, True, way, "cuda") for way in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(inside, separate, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("vocab", [2, 33, 1000, 50277, 65536])
def test_loss(dtype, vocab):
    cases.loss(dtype, vocab, vocab, "cuda")


def test_nan_and_inf_propagate():
    cases.not_finite("cuda")


def test_deterministic():
    first, second = (cases.all_gradients("cuda", (4, 1024, 768)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_on_current_stream():
    k = normal((300, 256), FP32, 0).cuda()
    expected = native.relu2(k)
    torch.cuda.synchronize()
    side, late = torch.cuda.Stream(), torch.zeros_like(k)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(k)
        y = native.relu2(late)
        assert not side.query()  # no synchronisation
    side.synchronize()
    assert torch.equal(y, expected)


@pytest.fixture
def step():
    """Loss, gradients and bytes of saved activations of a step of a small model with the given
    kernels.
    """

    def run(kernels, grad_cp=False, dtype=BF16):
        model = RWKV(Sizes(2, 256, 1000, 256, 1024), grad_cp)
        torch.manual_seed(0)
        model.initialise(1e-4)
        model.cuda()
        tokens = torch.randint(1000, (2, 257), generator=torch.Generator().manual_seed(1)).cuda()
        before, native._kernels = native._kernels, kernels
        try:
            torch.cuda.synchronize()
            start = torch.cuda.memory_allocated()
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != FP32):
                hidden, _ = model.hidden(tokens[:, :-1])
                loss = head_loss(hidden, model.head.weight, tokens[:, 1:])
            saved = torch.cuda.memory_allocated() - start
            loss.backward()
        finally:
            native._kernels = before
        return loss.detach(), [p.grad for p in model.parameters()], saved

    return run


@pytest.mark.parametrize("grad_cp", [False, True])
def test_step_matches_torch_operations(step, grad_cp):
    step(native._kernels, grad_cp, FP32)  # allocates cuBLAS's workspace
    ours, theirs = step(native._kernels, grad_cp, FP32), step(lambda *_: None, grad_cp, FP32)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max().clamp_min(1e-3))
    assert ours[2] <= theirs[2] + (4 << 10)  # saved activations; and a copy of ln_out's parameters


def test_no_host_sync(step):
    step(native._kernels)  # loads kernels and libraries
    model = RWKV(Sizes(2, 256, 1000, 256, 1024))
    model.initialise(1e-4)
    model.cuda()
    adam = fused_adam.adam([{"params": list(model.parameters())}], False, True, False)
    tokens = torch.randint(1000, (2, 257)).pin_memory()

    def train_step():
        ids = tokens.to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=BF16):
            hidden, _ = model.hidden(ids[:, :-1])
            loss = head_loss(hidden, model.head.weight, ids[:, 1:])
        loss.backward()
        fused_adam.set_clip(adam, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", adamw_cases.DTYPES, ids=str)
@pytest.mark.parametrize("size", [*adamw_cases.SIZES, (1 << 22) + 300])  # the last: several blocks per warp
def test_adamw_equals_reference(dtype, size):
    def launch(*arguments):
        moved = [x.cuda() if torch.is_tensor(x) else x for x in arguments]
        gpu.cuda_kernels(0).adamw(*moved)
        for mine, new in zip(arguments, moved, strict=True):
            if torch.is_tensor(mine):
                mine.copy_(new)

    found, expected = (adamw_cases.steps(dtype, size, f) for f in (launch, adamw.reference))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
