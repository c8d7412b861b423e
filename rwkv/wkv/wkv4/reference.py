"""The WKV4 recurrence as a loop over time with autograd: the ground truth of the tests."""

import torch
from torch import Tensor

EMPTY = -1e38  # the running maximum of an empty state


def wkv4(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rwkv.wkv.wkv4` in fp32, or in fp64 if k is fp64. `initial` defaults to `state`."""
    compute = torch.float64 if k.dtype == torch.float64 else torch.float32
    dtype, (batch, length, channels) = k.dtype, k.shape
    w, u, k, v = (x.to(compute) for x in (w, u, k, v))
    empty = empty_state(batch, channels, k.device, compute)
    state = empty if state is None else state.to(compute)
    initial = state if initial is None else initial.to(compute)
    a, b, p = state.unbind(1)  # [B, C] each
    outputs = []
    for t in range(length):
        if reset is not None:
            a, b, p = torch.where(reset[:, t, None, None], initial, torch.stack([a, b, p], 1)).unbind(1)
        kt, vt = k[:, t], v[:, t]
        # The maximum is only a scale: y does not depend on it, so it is detached.
        q = torch.maximum(p, u + kt).detach()
        past, now = torch.exp(p.detach() - q), torch.exp(u + kt - q)
        outputs.append((past * a + now * vt) / (past * b + now))
        q = torch.maximum(p + w, kt).detach()
        past, now = torch.exp(p.detach() + w - q), torch.exp(kt - q)
        a, b, p = past * a + now * vt, past * b + now, q
    return torch.stack(outputs, 1).to(dtype), torch.stack([a, b, p], 1)


def empty_state(
    batch: int, channels: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The state before any token, [B, 3, C]: numerator 0, denominator 0, running maximum -1e38."""
    state = torch.zeros(batch, 3, channels, device=device, dtype=dtype)
    state[:, 2] = EMPTY
    return state
