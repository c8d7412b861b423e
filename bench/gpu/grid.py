"""Measure a grid of cases: a line for each on stdout, and all in a JSON file."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from timing import copy_speed, median_ms

from rwkv.kernels import build


def run(
    description: str,
    cases: Callable[[bool], Iterable[tuple]],
    measure: Callable[..., dict],
    line: Callable[[dict], str],
    header: str = "",
) -> None:
    """The main function of a benchmark. A case that fails is reported, and the others are measured.

    Args:
        cases: the arguments of `measure` for each case; fewer cases if its argument is true.
        measure: a result, from a case and the speed of a large copy in bytes per millisecond.
        line: how a result is printed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    speed = copy_speed()
    compiler = build.manifest().get("device", {}).get("compiler")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {compiler}; copy {speed / 1e9:.2f} TB/s")
    if header:
        print(header)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_per_ms": speed}
    results, failed = [], 0
    for case in cases(arguments.quick):
        try:
            results.append(measure(*case, speed))
        except Exception as error:
            print(f"{case}: {type(error).__name__}: {error}", flush=True)
            failed += 1
            continue
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(json.dumps({**about, "results": results}))
    if failed:
        sys.exit(f"{failed} measurements failed")


def loop_and_operator(operator: Callable, inputs: list[torch.Tensor], gy: torch.Tensor) -> dict[str, float]:
    """Milliseconds of both passes of the PyTorch loop and of the operator, with autograd."""
    leaves = [x.requires_grad_() for x in inputs]
    return {
        impl: median_ms(lambda i=impl: torch.autograd.grad(operator(*leaves, impl=i)[0], leaves, gy), budget_ms=1)
        for impl in ("reference", "cuda")
    }
