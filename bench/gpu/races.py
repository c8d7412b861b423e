"""A few launches of every kernel with barriers, for compute-sanitizer --tool racecheck."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "wkv"))
import adamw_cases
import fused_cases
import head_cases

from rwkv.kernels import gpu
from rwkv.wkv import wkv6, wkv7

fused_cases.norm(fused_cases.GPU_STREAMS[2], 3, 768, 0, "cuda")
fused_cases.norm(fused_cases.GPU_STREAMS[0], 3, 8200, 0, "cuda")
fused_cases.loss(torch.bfloat16, 65536, 0, "cuda")
fused_cases.loss(torch.float32, 33, 0, "cuda")
operators = [(wkv7, head_cases.inputs7, "cuda", 64), (wkv7, head_cases.inputs7, "cuda", 128)]
operators += [(wkv6, head_cases.inputs6, impl, size) for impl in ("cuda", "cuda-chunk") for size in (64, 128)]
if torch.cuda.get_device_capability() >= (8, 0):
    operators.append((wkv7, head_cases.inputs7, "cuda-chunk", 64))
for operator, inputs, impl, size in operators:
    length = 140 if impl == "cuda-chunk" else 40  # several chunks of WKV6
    tensors, state, reset = inputs(1, length, 1, size), head_cases.states(1, 1, size), head_cases.starts(1, length)
    head_cases.outputs_and_gradients(
        lambda *x, state, reset, initial, operator=operator, impl=impl: operator(
            *x, state, reset, initial=initial, impl=impl
        ),
        [x.cuda() for x in tensors],
        state.cuda(),
        reset.cuda(),
    )
adamw_cases.steps(
    torch.bfloat16, 5000, lambda *x: gpu.cuda_kernels(0).adamw(*(t.cuda() if torch.is_tensor(t) else t for t in x))
)
torch.cuda.synchronize()
