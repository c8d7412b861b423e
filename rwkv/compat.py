"""What differs between the stacks: torch 1.13.1 with Lightning 1.9 (cu117), torch 2 with Lightning 2 (modern). No other module asks for a version."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import re
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl


def trainer_options(precision: str, alone: bool) -> dict[str, Any]:
    """Arguments of pl.Trainer for fp32, tf32, bf16 or fp16, on one device alone or on several.

    Lightning 2 renamed precisions (with the old names it warns), the strategy that decides by itself, and the switch of the
    distributed sampler, which stays off: the dataset shares out its samples over the ranks itself.
    """
    several = "ddp_find_unused_parameters_false"
    if importlib.metadata.version("pytorch-lightning").startswith("1."):
        names = {"fp32": 32, "tf32": 32, "bf16": "bf16", "fp16": 16}
        return {"precision": names[precision], "strategy": None if alone else several, "replace_sampler_ddp": False}
    names = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    return {"precision": names[precision], "strategy": "auto" if alone else several, "use_distributed_sampler": False}


def gloo_sends_bf16() -> bool:
    """Whether processes on CPUs can send each other bf16, as ddp does with all weights when it starts: torch 1.13.1 answers "Invalid scalar type"."""
    return stack() != "cu117"


def fit(trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
    """trainer.fit, which comes back after Ctrl-C with `trainer.interrupted` set.

    Lightning 2 would ignore any further Ctrl-C and end the process with status 1.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    # Lightning 2.6 asks this of torch itself, and torch 2.13 answers every run with a FutureWarning.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
    try:
        trainer.fit(module)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)


def rwkv_tokenizer() -> ModuleType:
    """The library with the World vocabulary. Its author publishes it under two names: rwkv_tokenizer has a wheel for Python 3.10
    alone, pyrwkv_tokenizer for all."""
    try:
        return importlib.import_module("rwkv_tokenizer")
    except ModuleNotFoundError:
        return importlib.import_module("pyrwkv_tokenizer")


def cpp_extension() -> ModuleType:
    """torch.utils.cpp_extension, without its remark on a CUDA toolkit or GPU that is not there: neither is needed. torch 1 prints it, torch 2 logs it."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("torch.utils.cpp_extension")


def nvrtc() -> Path | None:
    """The NVRTC of torch's CUDA; None if there is none. It comes in wheels of NVIDIA's, those for CUDA 11 and 12 with a folder a library, those
    for 13 with one for all, or inside torch's own wheel or conda package."""
    import torch  # a second, and the converter needs none of it

    major = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [
        Path(place) / part / "lib"
        for place in (spec.submodule_search_locations or [] if spec else [])
        for part in (f"cu{major}", "cuda_nvrtc")
    ]
    folders += [Path(torch.__path__[0]) / "lib", Path(sys.prefix) / "lib"]
    # libnvrtc.so.11.2 is that of every 11.x since 11.2; torch's own wheels add a hash to the name
    found = [path for folder in folders if major for path in sorted(folder.glob(f"libnvrtc[.-]*so.{major}*"))]
    return next((path for path in found if not re.search("builtins|alt", path.name)), None)


def gpu_archs(nvrtc_version: str, known: list[int]) -> list[int]:
    """Compute capabilities to compile for, ascending: those that this stack's torch has code for. torch 1.13.1's NVRTC knows more, older and
    for Jetson only; CUDA 13 begins with Turing."""
    wanted = [60, 70, 75, 80, 86] if nvrtc_version.startswith("11.") else [arch for arch in known if arch >= 75]
    return [arch for arch in wanted if arch in known]


def autocast_dtype(device: str) -> Any:
    """The dtype that autocast computes in on devices of this type, None where it is off. torch 2.4 gave all devices one pair of functions and
    warns of the old ones."""
    import torch

    if stack() == "cu117":
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@functools.cache
def stack() -> str:
    """The stack that this Python has, by its torch: the name of its lock in docker/locks/."""
    return "cu117" if importlib.metadata.version("torch").startswith("1.") else "modern"


def pythons() -> list[str]:
    """Pythons that the stack is locked for."""
    return ["3.10"] if stack() == "cu117" else ["3.10", "3.11", "3.12", "3.13"]


DRIVERS = {"11": (450, 515), "12": (525, 525), "13": (580, 580)}
"""For each major CUDA version the oldest NVIDIA driver that runs its later minor versions too, and the driver that 11.7, 12.0, 13.0 came
with (CUDA Toolkit release notes)."""
