"""The WKV6 recurrence as a loop over time with autograd: the ground truth of the tests."""

import torch
from torch import Tensor

from rwkv.wkv.heads import empty_state


def wkv6(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv6` in fp32, or in fp64 if r is fp64. `initial` defaults to `state`."""
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    dtype, (batch, length, heads, size) = r.dtype, r.shape
    r, w, k, v, u = (x.to(compute) for x in (r, w, k, v, u))
    S = empty_state(batch, heads, size, r.device, compute) if state is None else state.to(compute)
    initial = S if initial is None else initial.to(compute)
    decay, bonus = w.exp().expand_as(r).unsqueeze(-1), u.unsqueeze(-1)
    outputs = []
    for t in range(length):
        if reset is not None:
            S = torch.where(reset[:, t, None, None, None], initial, S)
        kv = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)  # [B, H, N (key), N (value)]
        outputs.append((r[:, t].unsqueeze(-2) @ (S + bonus * kv)).squeeze(-2))
        S = S * decay[:, t] + kv
    return torch.stack(outputs, 1).to(dtype), S
