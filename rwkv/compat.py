"""What differs between the stacks: torch 1.13.1 with Lightning 1.9 (cu117), torch 2 with Lightning 2 (modern). No other module asks for a version."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import signal
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
    """The NVRTC that came with torch's CUDA wheels; None if there is none, as with a CPU build. NVIDIA's wheels for CUDA 11 and 12 have a folder
    a library, those for CUDA 13 one for all."""
    import torch  # a second, and the converter needs none of it

    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    major = (torch.version.cuda or "").split(".")[0]
    found = [path for folder in folders for pattern in (f"cu{major}", "cuda_nvrtc") for path in folder.glob(f"{pattern}/lib/libnvrtc.so.*")]
    return next(iter(sorted(found)), None)


def gpu_archs(nvrtc_version: str, known: list[int]) -> list[int]:
    """Compute capabilities to compile for, ascending: those that this stack's torch has code for. torch 1.13.1's NVRTC knows more, older and
    for Jetson only; CUDA 13 begins with Turing."""
    wanted = [60, 70, 75, 80, 86] if nvrtc_version.startswith("11.") else [arch for arch in known if arch >= 75]
    return [arch for arch in wanted if arch in known]
