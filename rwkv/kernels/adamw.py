"""A step of AdamW with moments in 8 bits and stochastic rounding of bf16 weights: compiled kernels
for CPUs and GPUs, and a reference, which give the same bits.

Formulas: cuda/optimizer/adamw.h. The quantisation is that of bitsandbytes 0.50: blocks of 256
elements, in row order, are divided by their absmax and rounded to the nearest of the 256 levels of
"dynamic" 8-bit numbers (Dettmers et al. 2022, arXiv:2110.02861), signed for the first and unsigned
for the second moment; unlike there, a positive second moment is never rounded to 0. Tensors of less
than 4096 elements have fp32 moments, as in bitsandbytes.
"""

import functools
import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from rwkv.kernels import gpu, load, quant

BLOCK = 256
MIN_QUANTISED = 4096
_CHUNK = 1 << 20  # elements that the reference processes at a time; a multiple of BLOCK
_TINY = 2.0**-126  # instead of a smaller absmax, whose inverse could be infinite

State = dict[str, Any]


def state_bytes(elements: int) -> int:
    """The bytes of the moments of a tensor."""
    return 2 * elements + 8 * -(-elements // BLOCK) if elements >= MIN_QUANTISED else 8 * elements


def new_state(p: Tensor, quantised: bool = True) -> State:
    """The state before the first step: `step`, the number of steps; `moment1` and `moment2`, uint8
    codes with `absmax1` and `absmax2` [blocks], or fp32; not quantised: always fp32.
    """
    n = p.numel()
    if n < MIN_QUANTISED or not quantised:
        return {"step": 0, **{f"moment{i}": torch.zeros(n, device=p.device) for i in (1, 2)}}
    state: State = {"step": 0}
    for i in (1, 2):
        state[f"moment{i}"] = torch.zeros(n, dtype=torch.uint8, device=p.device)
        state[f"absmax{i}"] = torch.zeros(-(-n // BLOCK), device=p.device)
    return state


@functools.lru_cache
def tables(device: torch.device | str = "cpu") -> Tensor:
    """[4, 256]: the levels of the first moment, and the bounds between neighbouring levels (255,
    and an unused one); then both for the second moment.
    """
    rows = []
    for signed in (True, False):
        levels = quant.dynamic_levels("cpu", signed)
        rows += [levels, torch.cat([(levels[:-1] + levels[1:]) / 2, torch.full((1,), math.inf)])]
    return torch.stack(rows).to(device)


def rounding_key(seed: int, step: int, name: str) -> int:
    """The key of the random bits for rounding in a step of a parameter, 32 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=4).digest(), "little")


@torch.no_grad()
def step(
    p: Tensor, gradient: Tensor, state: State, clip: Tensor, key: int,
    rate: float, betas: tuple[float, float], eps: float, decay: float,
) -> None:  # fmt: skip
    """Update a weight, fp32 or bf16 and contiguous, and its state.

    Args:
        gradient: in the dtype of p.
        clip: fp32 [1] on the device, a factor of the gradient. If it is NaN, weight and moments do
            not change.
        key: rounding_key(...); not used for fp32 weights.
        decay: decoupled weight decay.
    """
    state["step"] += 1
    moments = state["moment1"], state["moment2"], state.get("absmax1"), state.get("absmax2")
    numbers = state["step"], rate, *betas, eps, decay, key
    operation: Any = _kernel(p.device) or reference
    operation(p, gradient.contiguous(), *moments, tables(p.device), clip, *numbers)


def _kernel(device: torch.device) -> Any:
    """The compiled operation for a device; None if unavailable."""
    if device.type == "cuda":
        return gpu.cuda_kernels(device.index).adamw if load.why_unavailable_on(device.index) is None else None  # type: ignore[attr-defined]
    return torch.ops.rwkv.adamw if load.why_unavailable() is None else None


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A moment x [n] in fp32 → codes [n] in uint8, absmax [blocks]."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).view(-1)[: x.numel()]
    codes = torch.bucketize(scaled, tables(x.device)[1 if signed else 3, :255])
    return (codes if signed else codes.clamp_(min=(x > 0).long())).to(torch.uint8), absmax


def dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Inverse of `quantise`, in fp32."""
    return tables(codes.device)[0 if signed else 2][codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]


def reference(
    p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, m_max: Tensor | None, v_max: Tensor | None, _: Tensor,
    clip: Tensor, step: int, rate: float, beta1: float, beta2: float, eps: float, decay: float, key: int,
) -> None:  # fmt: skip
    """As torch.ops.rwkv.adamw, in torch's operations, a part at a time."""
    if bool(clip.isnan()):
        return
    numbers = (1 - rate * decay, 1 - beta1, beta2, 1 - beta2, rate / (1 - beta1**step), math.sqrt(1 - beta2**step), eps)
    # tensors: torch would multiply by the inverse of a number on the host
    keep, gain1, beta, gain2, size, correction, epsilon = torch.tensor(numbers, device=p.device)
    for begin in range(0, p.numel(), _CHUNK):
        at, blocks = slice(begin, begin + _CHUNK), slice(begin // BLOCK, (begin + _CHUNK) // BLOCK)
        weight, g = p.view(-1)[at].float(), gradient.view(-1)[at].float() * clip
        before = [m[at], v[at]]
        if m_max is not None and v_max is not None:
            before = [dequantise(m[at], m_max[blocks], True), dequantise(v[at], v_max[blocks], False)]
        new_m = before[0] + (g - before[0]) * gain1
        new_v = before[1] * beta + (g * g) * gain2
        root = new_v.double().sqrt().float()  # correctly rounded; MKL's fp32 root is not
        weight = weight * keep - (new_m * size) / (root / correction + epsilon)
        p.view(-1)[at] = round_stochastically(weight, begin, key) if p.dtype == torch.bfloat16 else weight
        if m_max is not None and v_max is not None:
            m[at], m_max[blocks] = quantise(new_m, True)
            v[at], v_max[blocks] = quantise(new_v, False)
        else:
            m[at], v[at] = new_m, new_v


def round_stochastically(x: Tensor, begin: int, key: int) -> Tensor:
    """Round fp32 x [n] to bf16, up or down, by random bits that depend on the element's index
    (counted from `begin`) and the key; exact on average.
    """
    element = torch.arange(begin, begin + x.numel(), device=x.device)
    bits = (x.view(torch.int32) + (_scramble(_scramble(element) ^ key) >> 16).to(torch.int32)) >> 16
    return torch.where(x.isnan(), x.bfloat16(), bits.to(torch.int16).view(torch.bfloat16))


def _scramble(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser (Appleby, public domain), of 32-bit numbers in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
