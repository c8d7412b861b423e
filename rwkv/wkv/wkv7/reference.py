"""The WKV7 recurrence as a loop over time with autograd: the ground truth of the tests."""

import torch
from torch import Tensor

from rwkv.wkv.heads import empty_state


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv7` in fp32, or in fp64 if r is fp64. `initial` defaults to `state`."""
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    dtype, (batch, length, heads, size) = r.dtype, r.shape
    r, w, k, v, a, b = (x.to(compute) for x in (r, w, k, v, a, b))
    S = empty_state(batch, heads, size, r.device, compute) if state is None else state.to(compute)
    initial = S if initial is None else initial.to(compute)
    outputs = []
    for t in range(length):
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], initial, S)
        rt, kt, vt, at, bt = (x[:, t].unsqueeze(-1) for x in (r, k, v, a, b))  # columns [B, H, N, 1]
        S = S * w[:, t].exp().unsqueeze(-2) + (S @ at) @ bt.mT + vt @ kt.mT
        outputs.append((S @ rt).squeeze(-1))
    return torch.stack(outputs, 1).to(dtype), S
