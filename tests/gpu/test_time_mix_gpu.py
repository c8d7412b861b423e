"""The CUDA kernels of the time-mix of RWKV-5 to 7 on a GPU: accuracy, determinism, CUDA graphs, and
models with and without them. Not run on a GPU so far; on a CPU they are run by
tests/wkv/wkv7/test_cuda_time_mix.py and tests/kernels/test_cuda_shift.py. `make gpu-report` runs
this file before the others, and these without the kernels if it fails.
"""

import pytest
import shift_cases
import time_mix_cases
import torch
from adapter_dropout_cases import shifted

from rwkv.kernels import gpu, load
from rwkv.kernels.elementwise import by_head
from rwkv.kernels.elementwise import reference as elementwise
from rwkv.kernels.head_loss import head_loss
from rwkv.models import RWKV
from rwkv.models.version import VERSIONS
from rwkv.wkv.wkv7.time_mix import Parameters, Projections, time_mix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.03}  # WKV's inputs and outputs are rounded


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.delenv("RWKV_FUSED", raising=False)
    assert load.why_unavailable_on(0) is None


def outputs_and_gradients(x, v_first, p, state, reset, impl, dtype=None):
    tensors = [v_first, state, *x, *p]
    leaves = [None if t is None else t.cuda().to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
    y, last = time_mix(Projections(*leaves[2:9]), leaves[0], Parameters(*leaves[9:]), leaves[1], reset.cuda(),
                       eps=64e-5, impl=impl)  # fmt: skip
    g = torch.Generator().manual_seed(2)
    gy, glast = (torch.randn(t.shape, generator=g, dtype=torch.float64).cuda() for t in (y, last))
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), last.detach(), *torch.autograd.grad((gy * y).sum() + (glast * last).sum(), wanted)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first_block", [False, True])
@pytest.mark.parametrize(("H", "N"), [(3, 16), (3, 48), (5, 64)])
def test_time_mix(dtype, first_block, H, N):
    given = *time_mix_cases.inputs(first_block, T=35, H=H, N=N, dtype=dtype), time_mix_cases.resets(T=35)
    assert by_head.kernels(N, *(t.cuda() for t in given[0] if t is not None)) is not None
    found = outputs_and_gradients(*given, "cuda")
    truth = outputs_and_gradients(*given, "reference", torch.float64)
    for ours, exact in zip(found, truth, strict=True):
        assert float((ours - exact).abs().max()) <= SHARE[dtype] * max(1.0, float(exact.abs().max()))
    again = outputs_and_gradients(*given, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated_norm(dtype):
    """The normalisation and gate after WKV, against float64."""
    g = torch.Generator().manual_seed(0)
    shapes = (2, 40, 3, 64), (2, 40, 192), (192,), (192,)
    y, gate, weight, bias = (torch.randn(shape, generator=g).cuda() for shape in shapes)
    given, results = [y.to(dtype), gate.to(dtype), weight, bias], []
    assert by_head.kernels(64, *given[:2]) is not None
    for function, kind in (
        (lambda *x: by_head.gated_norm(*x, 64e-5), None),
        (lambda *x: elementwise.gated_norm(64e-5, *x), torch.float64),
    ):
        leaves = [t.to(kind or t.dtype).requires_grad_() for t in given]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, gate.to(out.dtype))])
    for ours, truth in zip(*results, strict=True):
        # fp32 rounding, and that of the result (and of its gradient) to half precision
        share = 1e-5 if dtype == torch.float32 else 0.01
        assert float((ours - truth).abs().max()) <= share * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8, 5, 4), (2, 17, 33, 5, 3), (2, 100, 768, 5, 32), (1, 50, 24, 2, 2)])
@pytest.mark.parametrize("resets", [False, True])
def test_shift(dtype, shape, resets):
    shift_cases.check(gpu.cuda_kernels(0), dtype, shape, resets, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 33, 5, 3), (2, 100, 768, 5, 32)])
def test_shift_drops_the_same_elements(dtype, shape):
    drops = 0, 0.01, 0, 0.5, 0.9
    for ours, again, expected in shifted(gpu.cuda_kernels(0), dtype, shape, drops, True, "cuda"):
        assert torch.equal(ours, expected)
        assert torch.equal(again, expected)


def model_of(version):
    torch.manual_seed(0)
    model = RWKV(VERSIONS[version].Sizes(3, 128, 300)).cuda()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(
            parameter, mean=float(name.endswith(("ln1.weight", "ln2.weight", "ln_x.weight"))), std=0.1
        )
    return model


def losses_and_gradients(model, tokens, dtype):
    """Of all but the embedding, whose gradient cannot be captured with torch 1.13.1."""
    x = model.emb(tokens[:, :-1]).detach()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
        hidden, _ = model.after_embedding(x)
        loss = head_loss(hidden, model.head.weight, tokens[:, 1:])
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name != "emb.weight"]
    return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_models_with_and_without(monkeypatch, version, dtype):
    model, tokens = model_of(version), torch.randint(300, (2, 130), generator=torch.Generator().manual_seed(1)).cuda()
    fused = losses_and_gradients(model, tokens, dtype)
    monkeypatch.setenv("RWKV_FUSED", "0")
    plain = losses_and_gradients(model, tokens, dtype)
    # three blocks; bf16: rounded at other places. Executed on a CPU: 1.1e-4 and 0.013.
    share = {torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    for ours, theirs in zip(fused, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.isfinite().all()
            assert float((ours - theirs).norm()) <= share * float(theirs.norm()) + 1e-6


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_cuda_graph_capture(version):
    model, tokens = model_of(version), torch.randint(300, (2, 65), generator=torch.Generator().manual_seed(1)).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = losses_and_gradients(model, tokens, torch.bfloat16)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = losses_and_gradients(model, tokens, torch.bfloat16)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        # the same kernels, but cuBLAS may choose others
        assert ours is None or float((ours - theirs).norm()) <= 0.02 * float(theirs.norm()) + 1e-6
