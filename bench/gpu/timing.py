"""Time GPU kernels without launch overhead, and measure the peak speeds of this GPU."""

from collections.abc import Callable

import torch

CALLS = 20  # between two events
AHEAD = 20_000_000  # cycles (about 10 ms) that keep the GPU busy while the host launches the calls


def median_ms(run: Callable[[], object], budget_ms: float = 200) -> float:
    """GPU milliseconds per call, without launch overhead: the median over about `budget_ms`.

    After a warm-up, each measurement times CALLS calls, or one call if it is slow.
    """

    def timed(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    for _ in range(2):
        run()
    calls = CALLS if timed(1) < 10 else 1
    times: list[float] = []
    while len(times) < 5 or (sum(times) * calls < budget_ms and len(times) < 50):
        times.append(timed(calls))
    return sorted(times)[len(times) // 2]


def copy_speed() -> float:
    """Bytes read and written per millisecond by a large device-to-device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source))


def matmul_speed(size: int = 8192) -> float:
    """Operations per second of a large bf16 matmul on random data."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (median_ms(lambda: a @ b) / 1e3)
