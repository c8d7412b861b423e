"""A few launches of every kernel with barriers, for compute-sanitizer --tool racecheck."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "tests" / "wkv"))
import fused_cases

fused_cases.norm(fused_cases.GPU_STREAMS[2], 3, 768, 0, "cuda")
fused_cases.norm(fused_cases.GPU_STREAMS[0], 3, 8200, 0, "cuda")
fused_cases.loss(torch.bfloat16, 65536, 0, "cuda")
fused_cases.loss(torch.float32, 33, 0, "cuda")
torch.cuda.synchronize()
