"""Frozen matrices in 4 or 8 bits: quantisation, dequantisation to a dense matrix, and products in
FP8.

NF4   QLoRA (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 elements, in row order, divided
      by their absmax and rounded to 16 levels, the quantiles of a normal distribution. The absmax
      are quantised too: less their mean, in groups of 256, to the 256 levels of "dynamic" 8-bit
      numbers (Dettmers et al. 2022, arXiv:2110.02861). 4.127 bits per element.
int8  LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without its outliers: each row is divided
      by its absmax and rounded to multiples of 1/127.
fp8   e4m3 of "FP8 Formats for Deep Learning" (Micikevicius et al. 2022, arXiv:2209.05433): divided
      by one scale and rounded to 3 bits of mantissa. Products are computed in FP8, too
      (docs/decisions/036).

Levels and every rounding of NF4 and int8 are those of bitsandbytes 0.50 on a CPU, so that the dense
matrices are equal bit for bit (tests/kernels/test_quant.py).
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.kernels import gpu, load

BLOCK, GROUP = 64, 256
_CHUNK = 1 << 16  # elements quantised at a time, a multiple of BLOCK; larger ones leave holes in the heap
_TINY = 2.0**-126  # instead of an absmax of 0; a smaller one is 0 while training flushes denormals
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.lru_cache
def nf4_levels(device: torch.device | str = "cpu") -> Tensor:
    """[16]: the levels of NF4."""
    return torch.tensor(_NF4, device=device)


def absmax_levels(device: torch.device | str = "cpu") -> Tensor:
    """[256]: the levels of the absmax."""
    return dynamic_levels(device)


@functools.lru_cache
def dynamic_levels(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """[256], ascending: 0, 1, and for i = 0 to 6 the midpoints of 2^i equal parts of [0.1, 1],
    times ±10^(i − 6); unsigned, of 2^(i + 1) parts times 10^(i − 6). The bounds of the parts are
    rounded as by torch.linspace of torch 2 (that of 1.13 rounds otherwise): the first half counts
    from 0.1, the second from 1.
    """
    levels, start = [0.0, 1.0], torch.tensor(0.1)
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step, k = ((1 - start) / parts).double(), torch.arange(parts + 1).double()
        bounds = torch.where(k < (parts + 1) // 2, start.double() + step * k, 1 - step * (parts - k)).float()
        middles = 10.0 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        levels += [*middles.tolist(), *((-middles).tolist() if signed else [])]
    return torch.tensor(sorted(levels), device=device)


def _thresholds(levels: Tensor) -> Tensor:
    """The midpoints between neighbouring levels."""
    return (levels[:-1] + levels[1:]) / 2


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest level, of two the lower one, as uint8."""
    return torch.bucketize(x, _thresholds(levels), out_int32=True).to(torch.uint8)


def _scaled(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Divide blocks of `size` elements by their absmax: x [n] fp32 → [n], [blocks]. The last block
    may be shorter.
    """
    blocks = nn.functional.pad(x, (0, -x.numel() % size)).view(-1, size)
    absmax = blocks.abs().amax(1)
    inverse = 1.0 / absmax.clamp(min=_TINY)
    return (blocks * inverse[:, None]).clamp_(-1, 1).view(-1)[: x.numel()], absmax


def _nearest_in_table(x: Tensor, levels: Tensor) -> Tensor:
    """As _nearest for x in [−1, 1], by a table of 65536 values, as bitsandbytes quantises the
    absmax on CPUs. The level differs from the nearest for 0.2 % of them.
    """
    table = _nearest(torch.arange(65536) / 65535 * 2 - 1, levels)
    return table[(((x + 1) * 0.5) * 65535 + 0.5).long()]


class Quantised(nn.Module, abc.ABC):
    """A frozen matrix [rows, columns] in few bits. Used in place of a parameter.

    Its tensors are neither parameters nor buffers: they are not trained, saved or converted to
    another dtype, and DDP would broadcast buffers in every step. `Module.to` moves them.
    """

    kind: str
    _tensors: tuple[str, ...]

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    @abc.abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in this dtype, in new memory."""

    @property
    def device(self) -> torch.device:
        return self._tensor(0).device

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        tensors = map(self._tensor, range(len(self._tensors)))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.shape)}"

    def _tensor(self, i: int) -> Tensor:
        return getattr(self, self._tensors[i])

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Quantised":
        # as bytes: fn may convert floating-point tensors to another dtype
        for name in self._tensors:
            tensor = getattr(self, name)
            setattr(self, name, fn(tensor.view(torch.uint8)).view(tensor.dtype))
        return super()._apply(fn, *args, **kwargs)


class NF4(Quantised):
    """A matrix in NF4 with quantised absmax; see the top of this file.

    Attributes:
        packed: uint8 [⌈n / 2⌉], two elements each, the first in the upper half.
        absmax: uint8 [⌈n / 64⌉], of each block.
        group_absmax: fp32 [⌈n / 64 / 256⌉].
        offset: fp32 [1], the mean of the absmax.
    """

    kind, _tensors = "nf4", ("packed", "absmax", "group_absmax", "offset")

    def __init__(self, weight: Tensor):
        """Quantise a matrix on a CPU, a part at a time."""
        super().__init__(weight.shape)
        flat = weight.detach().reshape(-1)
        self.packed, parts = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8), []
        quantise = torch.ops.rwkv.nf4_quantise if _kernels(flat.device, torch.float32) else nf4_quantise_reference
        for begin in range(0, flat.numel(), _CHUNK):
            part = self.packed[begin // 2 : (begin + _CHUNK + 1) // 2]
            parts.append(quantise(flat[begin : begin + _CHUNK].float(), _thresholds(nf4_levels()), part))
        absmax = torch.cat(parts)
        self.offset = absmax.mean().view(1)
        scaled, self.group_absmax = _scaled(absmax - self.offset, GROUP)
        self.absmax = _nearest_in_table(scaled, absmax_levels())

    def dense(self, dtype: torch.dtype) -> Tensor:
        levels, of_absmax = nf4_levels(self.device), absmax_levels(self.device)
        tensors = self.packed, levels, self.absmax, of_absmax, self.group_absmax, self.offset
        if kernels := _kernels(self.device, dtype):
            return kernels.nf4_dense(*tensors, list(self.shape), dtype)
        return nf4_reference(*tensors, self.shape).to(dtype)


def nf4_quantise_reference(x: Tensor, thresholds: Tensor, packed: Tensor) -> Tensor:
    """Quantise x [n] fp32 into `packed` [⌈n / 2⌉]; returns the absmax of its blocks [⌈n / 64⌉]."""
    scaled, absmax = _scaled(x, BLOCK)
    levels = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
    levels = nn.functional.pad(levels, (0, len(levels) % 2))
    torch.bitwise_or(levels[::2] << 4, levels[1::2], out=packed)
    return absmax


def nf4_reference(
    packed: Tensor, levels: Tensor, absmax: Tensor, of_absmax: Tensor, group_absmax: Tensor, offset: Tensor,
    shape: torch.Size,
) -> Tensor:  # fmt: skip
    """The dense matrix of NF4, in fp32."""
    group = group_absmax.repeat_interleave(GROUP)[: absmax.numel()]
    scale = of_absmax[absmax.long()] * group + offset
    indices = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: math.prod(shape)]
    return (levels[indices.long()] * scale.repeat_interleave(BLOCK)[: indices.numel()]).view(shape)


class Int8(Quantised):
    """A matrix in int8; see the top of this file.

    Attributes:
        q: int8 [rows, columns].
        absmax: fp32 [rows].
    """

    kind, _tensors = "int8", ("q", "absmax")

    def __init__(self, weight: Tensor):
        """Quantise a matrix on a CPU, some rows at a time."""
        super().__init__(weight.shape)
        self.q, parts = torch.empty(self.shape, dtype=torch.int8), []
        size = max(1, _CHUNK // max(1, self.shape[1]))
        for part, target in zip(weight.detach().split(size), self.q.split(size), strict=True):
            rows = part.float()
            parts.append(rows.abs().amax(1))
            target.copy_(torch.round(rows * (127.0 / parts[-1].clamp(min=1e-36))[:, None]))  # 127 / 1e-38 overflows
        self.absmax = torch.cat(parts)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if kernels := _kernels(self.device, dtype):
            return kernels.int8_dense(self.q, self.absmax, dtype)
        return int8_reference(self.q, self.absmax).to(dtype)


def int8_reference(q: Tensor, absmax: Tensor) -> Tensor:
    """The dense matrix of int8, in fp32."""
    return q * absmax[:, None] * 7.874015718698502e-3  # 1/127 in fp32


class FP8(Quantised):
    """A matrix in FP8; see the top of this file. torch 2 only.

    Attributes:
        q: float8_e4m3fn [rows, columns].
        scale: fp32 [1, 1], the absmax of the matrix / 448.
    """

    kind, _tensors = "fp8", ("q", "scale")

    def __init__(self, weight: Tensor):
        """Quantise a matrix on a CPU, some rows at a time. RuntimeError on torch 1."""
        super().__init__(weight.shape)
        if compat.float8() is None:
            raise RuntimeError("fp8 needs torch 2 (the modern stack): torch 1 has no float8")
        self.q = torch.empty(self.shape, dtype=compat.float8())
        parts = weight.detach().split(max(1, _CHUNK // max(1, self.shape[1])))
        self.scale = _fp8_scale(torch.stack([part.abs().max().float() for part in parts]).max()).view(1, 1)
        for part, target in zip(parts, self.q.split(len(parts[0])), strict=True):
            target.copy_(part.float() / self.scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.q.float() * self.scale).to(dtype)

    @property
    def multiplies(self) -> bool:
        """Whether GPUs compute its products in FP8, which needs multiples of 16; else it is
        dequantised.
        """
        return all(size % 16 == 0 for size in self.shape)

    def times_transpose(self, x: Tensor) -> Tensor:
        """x Wᵀ in x's dtype: [N, columns] → [N, rows]."""
        return _fp8_product(x, self.q.t(), self.scale)

    def times(self, g: Tensor) -> Tensor:
        """g W in g's dtype: [N, rows] → [N, columns]. GPUs multiply by a matrix stored by columns,
        so W is copied, with 1 byte per element.
        """
        return _fp8_product(g, self.q.t().contiguous().t(), self.scale)


def _fp8_scale(absmax: Tensor) -> Tensor:
    """The divisor by which the largest element becomes 448, the largest number in e4m3. Not less
    than the smallest normal number: training flushes denormals to 0.
    """
    return (absmax / 448).clamp(min=_TINY)


def _fp8_product(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """x times an FP8 matrix stored by columns, in x's dtype; each row of x is rounded to FP8 with a
    scale of its own. GPUs return bf16 for scales by row, so the product is rounded to bf16.
    """
    of_rows = _fp8_scale(x.abs().amax(1, keepdim=True).float())
    rounded = (x / of_rows).to(matrix.dtype).contiguous()
    of_columns = scale.expand(1, matrix.shape[1]).contiguous()
    newer: Any = torch  # the stubs are those of 1.13.1
    product = newer._scaled_mm(rounded, matrix, scale_a=of_rows, scale_b=of_columns, out_dtype=torch.bfloat16)
    return product.to(x.dtype)


KINDS: dict[str, Callable[[Tensor], Quantised]] = {"nf4": NF4, "int8": Int8, "fp8": FP8}
"""Quantise a matrix, by the value of --lora_base."""


def quantised_in(model: nn.Module) -> list[Quantised]:
    """The quantised matrices of a model."""
    return [module for module in model.modules() if isinstance(module, Quantised)]


def nbytes(kind: str, shape: torch.Size) -> int:
    """The bytes of a quantised matrix of this shape."""
    if kind == "int8":
        return shape.numel() + 4 * shape[0]
    if kind == "fp8":
        return shape.numel() + 4
    blocks = -(-shape.numel() // BLOCK)
    return (shape.numel() + 1) // 2 + blocks + 4 * -(-blocks // GROUP) + 4


def _kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The compiled operations for this device and dtype; None if unavailable."""
    if device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return gpu.cuda_kernels(device.index) if load.why_unavailable_on(device.index) is None else None
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return torch.ops.rwkv if load.why_unavailable() is None else None
    return None
