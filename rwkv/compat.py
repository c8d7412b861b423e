"""Differences between the stacks: torch 1.13.1 with Lightning 1.9 (cu117), torch 2 with Lightning 2
(modern). No other module checks a version.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
    import torch


def trainer_options(precision: str, strategy: Any) -> dict[str, Any]:
    """Arguments of pl.Trainer for a precision (fp32, tf32, bf16, fp16) and a strategy (None: a
    single device).

    Lightning 2 renamed the precisions, the automatic strategy and the flag of the distributed
    sampler. The sampler is off because the dataset shards its samples over the ranks.
    """
    if importlib.metadata.version("pytorch-lightning").startswith("1."):
        names = {"fp32": 32, "tf32": 32, "bf16": "bf16", "fp16": 16}
        return {"precision": names[precision], "strategy": strategy, "replace_sampler_ddp": False}
    names = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    return {"precision": names[precision], "strategy": strategy or "auto", "use_distributed_sampler": False}


def process_bytes() -> int:
    """Resident memory of a training process after one step, without its model: the libraries, in
    bytes.
    """
    return (290 if stack() == "cu117" else 555) << 20


def enable_mkl_avx2() -> None:
    """Let MKL use AVX2 on AMD CPUs; call before the first matmul.

    torch 1.13.1 bundles MKL 2020.0, which avoids AVX2 on non-Intel CPUs and runs fp32 GEMM at about
    a third of peak; MKL_DEBUG_CPU_TYPE=5 forces AVX2 (docs/decisions/001). Later versions ignore
    it.
    """
    if stack() == "cu117" and _avx2_but_not_intel():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def _avx2_but_not_intel() -> bool:
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return False
    return "GenuineIntel" not in cpu and {"avx2", "fma"} <= set(cpu.split())


def onednn_matmul() -> Any:
    """A function (x [N, in], W [out, in]) → x Wᵀ that calls oneDNN's fp32 matmul on a CPU; None on
    torch 1, whose oneDNN needs another memory layout. torch.compile uses the same operator.
    """
    import torch

    if stack() == "cu117" or not torch.backends.mkldnn.is_available():
        return None
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x, weight: linear(x, weight, None, "none", [], "")


def foreach_copy(to: "list[torch.Tensor]", from_: "list[torch.Tensor]") -> None:
    """Copy every tensor of from_ into that of `to`, with a cast. On GPUs in few kernels, but in one
    for each tensor on torch 1.13.1.
    """
    import torch

    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(to, from_)
        return
    for one, other in zip(to, from_, strict=True):
        one.copy_(other)


def gloo_supports_bf16() -> bool:
    """Whether gloo can broadcast bf16 tensors, as DDP does with all weights at the start. torch
    1.13.1 raises "Invalid scalar type".
    """
    return stack() != "cu117"


def fit(trainer: "pl.Trainer", module: "pl.LightningModule") -> None:
    """trainer.fit, but returns after Ctrl-C, with `trainer.interrupted` set.

    Lightning 2 would ignore any further Ctrl-C and exit with status 1.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    # Lightning 2.6 causes this FutureWarning of torch 2.13 in every run.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*")
    # DeepSpeed 0.19 uses a name that torch 2.13 deprecated.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor` is deprecated.*")
    try:
        trainer.fit(module)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)


def why_deepspeed_unavailable(on_gpu: bool) -> str | None:
    """Why DeepSpeed cannot train here, or None. Versions before 0.9 require a CUDA device."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed; run make venv to install it, or use --strategy ddp"
    if not on_gpu and is_old_deepspeed():
        version = importlib.metadata.version("deepspeed")
        return f"DeepSpeed {version} trains on GPUs only; on a CPU use --strategy ddp, or the modern stack (make venv STACK=modern)"
    return None


def import_deepspeed(on_gpu: bool) -> None:
    """Import DeepSpeed for the first time, without torch's warning about a missing CUDA toolkit. On
    a CPU, let it use its CPU accelerator and compile nothing.
    """
    cpp_extension()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    if is_old_deepspeed():
        importlib.import_module("rwkv.deepspeed07").apply()
    elif not on_gpu:
        # compiling it would take a minute while the ranks wait; gloo works as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@functools.cache  # asked for by every parameter; the answer is read from a file
def is_old_deepspeed() -> bool:
    """Whether DeepSpeed is version 0.7 (the cu117 stack) or 0.8."""
    return importlib.metadata.version("deepspeed").startswith(("0.7.", "0.8."))


def deepspeed_options() -> dict[str, Any]:
    """Configuration keys for this version of DeepSpeed. Its throughput timer would synchronise with
    the GPU twice per micro-batch.
    """
    return {} if is_old_deepspeed() else {"timers": {"throughput": {"enabled": False}}}


def zero3_recomputes_reentrantly() -> bool:
    """Whether gradient checkpointing under ZeRO-3 needs torch's reentrant implementation.

    The non-reentrant one recomputes inside the backward pass of a block's last operation. DeepSpeed
    0.7.0 then partitions the block's weights before their gradients are computed.
    """
    return is_old_deepspeed()


def zero3_broadcasts_weights() -> bool:
    """Whether ZeRO-3 starts from rank 0's weights, as all other strategies do. DeepSpeed 0.7.0
    shards the weights that each rank has.
    """
    return not is_old_deepspeed()


def cuda_graphs_are_tested() -> bool:
    """Whether training from a CUDA graph has been tested with this torch: from 2.0 on."""
    import torch

    return hasattr(torch, "compile")


def graph_options() -> dict[str, Any]:
    """Options of torch.cuda.make_graphed_callables. (RWKV-7's block 0 has unused parameters.)"""
    return {"allow_unused_input": True} if cuda_graphs_are_tested() else {}


def expect_gradients_of_another_stream() -> None:
    """Silence newer torch's warning that gradients come from another stream than the default one:
    a CUDA graph is captured on its own.
    """
    import torch

    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


def on_gradient(parameter: "torch.nn.Parameter", function: Any) -> Any:
    """Call function(parameter) in every backward pass, when the parameter's gradient has been added
    to `grad`. Returns an object that must be kept as long as the parameter.

    torch 1 has no such hook for tensors, only for the node of the graph that adds gradients, to
    which tensors refer weakly.
    """
    if hasattr(parameter, "register_post_accumulate_grad_hook"):
        return parameter.register_post_accumulate_grad_hook(function)
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: function(parameter))
    return node


def reset_step_counts(optimizer: "torch.optim.Optimizer") -> None:
    """Reset the optimizer's step counts to 0.

    DeepSpeed 0.7.0 allocates the optimizer state with a step on zero gradients. Adam's bias
    correction would count it, and the first update would be a quarter too small.
    """
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam
            group["step"] = 0
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0


def deepspeed_ops() -> dict[str, str]:
    """DeepSpeed's precompiled ops, each with the reason why it does not load ("" if it loads).
    cpu_adam needs libcurand, which is not in torch's dependencies.
    """
    import torch  # noqa: F401  # loads the libraries that the ops link to

    reasons = {}
    for name, compiled in importlib.import_module("deepspeed.git_version_info").installed_ops.items():
        if compiled:
            reasons[name] = ""
            if name.endswith("_adam"):
                try:
                    importlib.import_module(f"deepspeed.ops.adam.{name}_op")
                except ImportError as error:
                    reasons[name] = str(error)
    return reasons


def deepspeed_adam(offloaded: bool) -> Any:
    """DeepSpeed's Adam for the GPU, or for the CPU if offloaded; None if it is not precompiled or
    does not load.
    """
    if deepspeed_ops().get("cpu_adam" if offloaded else "fused_adam", "not compiled"):
        return None
    adam = importlib.import_module("deepspeed.ops.adam")
    return (
        functools.partial(adam.DeepSpeedCPUAdam, adamw_mode=True)
        if offloaded
        else functools.partial(adam.FusedAdam, adam_w_mode=True)
    )


def rwkv_tokenizer() -> ModuleType:
    """The tokenizer library with the World vocabulary, which is published under two names:
    rwkv_tokenizer has wheels for Python 3.10 only, pyrwkv_tokenizer for all versions.
    """
    try:
        return importlib.import_module("rwkv_tokenizer")
    except ModuleNotFoundError:
        return importlib.import_module("pyrwkv_tokenizer")


def cpp_extension() -> ModuleType:
    """torch.utils.cpp_extension, without its warning about a missing CUDA toolkit or GPU, neither
    of which is needed. torch 1 prints the warning, torch 2 logs it.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("torch.utils.cpp_extension")


def nvrtc() -> Path | None:
    """Path of the NVRTC library of torch's CUDA version, or None.

    It is in NVIDIA's wheels (for CUDA 11 and 12 one folder per library, for 13 one folder for all),
    or inside torch's own wheel or conda package.
    """
    import torch  # takes a second to import, and conversion does not need it

    major = (torch.version.cuda or "").split(".")[0]
    spec = importlib.util.find_spec("nvidia")
    folders = [
        Path(place) / part / "lib"
        for place in (spec.submodule_search_locations or [] if spec else [])
        for part in (f"cu{major}", "cuda_nvrtc")
    ]
    folders += [Path(torch.__path__[0]) / "lib", Path(sys.prefix) / "lib"]
    # libnvrtc.so.11.2 is the name for all 11.x since 11.2; torch's wheels append a hash
    found = [path for folder in folders if major for path in sorted(folder.glob(f"libnvrtc[.-]*so.{major}*"))]
    return next((path for path in found if not re.search("builtins|alt", path.name)), None)


def gpu_archs(nvrtc_version: str, known: list[int]) -> list[int]:
    """Compute capabilities to compile for, ascending: those that this stack's torch supports. NVRTC
    11.7 also supports older and Jetson-only ones; CUDA 13 starts with Turing.
    """
    wanted = [60, 70, 75, 80, 86] if nvrtc_version.startswith("11.") else [arch for arch in known if arch >= 75]
    return [arch for arch in wanted if arch in known]


def autocast_dtype(device: str) -> Any:
    """The autocast dtype for a device type, or None if autocast is off. torch 2.4 deprecated the
    functions per device type.
    """
    import torch

    if stack() == "cu117":
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    newer: Any = torch  # the stubs are those of 1.13.1
    return newer.get_autocast_dtype(device) if newer.is_autocast_enabled(device) else None


@functools.cache
def stack() -> str:
    """The stack of this Python environment, by its torch version: the name of a lock in
    env/locks/.
    """
    return "cu117" if importlib.metadata.version("torch").startswith("1.") else "modern"


def float8() -> Any:
    """The dtype float8_e4m3fn; None on torch 1, which has none."""
    import torch

    return getattr(torch, "float8_e4m3fn", None)


def pythons() -> list[str]:
    """Python versions that the stack is locked for."""
    return ["3.10"] if stack() == "cu117" else ["3.10", "3.11", "3.12", "3.13"]


def drivers() -> dict[str, tuple[int, int]]:
    """For each major CUDA version: the oldest NVIDIA driver that supports its minor versions, and
    the driver released with this stack's version.
    """
    lines = Path(__file__).with_name("drivers.txt").read_text(encoding="utf-8").splitlines()
    return {
        major: (int(oldest), int(own))
        for major, oldest, own, _ in (line.split() for line in lines if not line.startswith("#"))
    }


def storage(tensor: Any) -> Any:
    """A tensor's storage; torch 2 deprecated torch 1's accessor."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


def untyped_storage(tensor: Any) -> Any:
    """A tensor's untyped storage; torch 1 wraps it in the typed storage."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage().untyped()


def record(storage: Any) -> Any:
    """An untyped storage as PyTorchFileWriter.write_record accepts it: in torch 1.13.1 its
    address.
    """
    return storage if stack() == "modern" else storage.data_ptr()
