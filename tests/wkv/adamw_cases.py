"""Steps of AdamW on recorded gradients, for the kernels of all devices."""

import torch

from rwkv.kernels import adamw

DTYPES = (torch.bfloat16, torch.float32)
SIZES = (1, 100, 4096, 5001, 256 * 130 + 77)  # moments in fp32 below 4096; whole blocks and not; more than one task


def steps(dtype, size, operation, count=6, skipped=-1):
    """Weight and state after `count` steps by `operation` (as torch.ops.rwkv.adamw), with gradients
    of all magnitudes and zeros. Gradients of step `skipped` are skipped by a NaN as clip.
    """
    generator = torch.Generator().manual_seed(size)
    p = torch.randn(size, generator=generator).to(dtype)
    state = adamw.new_state(p)
    for step in range(count):
        gradient = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
        gradient *= torch.rand(size, generator=generator) < 0.8
        clip = torch.tensor([float("nan") if step == skipped else 0.3])
        moments = state["moment1"], state["moment2"], state.get("absmax1"), state.get("absmax2")
        numbers = step + 1, 1e-2, 0.9, 0.99, 1e-8, 0.1, adamw.rounding_key(1, step, "weight")
        operation(p, gradient.to(dtype), *moments, adamw.tables(), clip, *numbers)
    return {"weight": p, **{name: x for name, x in state.items() if torch.is_tensor(x)}}
