"""A few launches of every kernel with barriers, for compute-sanitizer --tool racecheck."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "wkv"))
import fused_cases
import head_cases

from rwkv.wkv import wkv7

fused_cases.norm(fused_cases.GPU_STREAMS[2], 3, 768, 0, "cuda")
fused_cases.norm(fused_cases.GPU_STREAMS[0], 3, 8200, 0, "cuda")
fused_cases.loss(torch.bfloat16, 65536, 0, "cuda")
fused_cases.loss(torch.float32, 33, 0, "cuda")
tensors, state, reset = head_cases.inputs7(1, 40, 1, 64), head_cases.states(1, 1, 64), head_cases.starts(1, 40)
head_cases.outputs_and_gradients(
    lambda *x, state, reset, initial: wkv7(*x, state, reset, initial=initial, impl="cuda-chunk"),
    [x.cuda() for x in tensors],
    state.cuda(),
    reset.cuda(),
)
torch.cuda.synchronize()
