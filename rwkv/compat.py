"""What differs between the stacks: torch 1.13.1 with Lightning 1.9 (cu117), torch 2 with Lightning 2 (modern). No other module asks for a version."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
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
    """Arguments of pl.Trainer for fp32, tf32, bf16 or fp16, and for a strategy; None: one device alone.

    Lightning 2 renamed precisions (with the old names it warns), the strategy that decides by itself, and the switch of the
    distributed sampler, which stays off: the dataset shares out its samples over the ranks itself.
    """
    if importlib.metadata.version("pytorch-lightning").startswith("1."):
        names = {"fp32": 32, "tf32": 32, "bf16": "bf16", "fp16": 16}
        return {"precision": names[precision], "strategy": strategy, "replace_sampler_ddp": False}
    names = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    return {"precision": names[precision], "strategy": strategy or "auto", "use_distributed_sampler": False}


def process_bytes() -> int:
    """Resident memory of a training process that has made a step, without its model: the libraries."""
    return (290 if stack() == "cu117" else 555) << 20


def heap_share() -> float:
    """Freed memory that glibc cannot reuse, on a CPU, per byte of tensors that come and go: measured in small runs."""
    return 0.5 if stack() == "cu117" else 0.3


def wake_mkl() -> None:
    """To be called before the first product of matrices on a CPU. MKL 2020.0, which torch 1.13.1 has inside, multiplies fp32 at a third of the speed of
    processors that are not Intel's unless this variable names AVX2 for them (docs/decisions/001); later ones do not know it, and do better."""
    if stack() == "cu117" and _avx2_but_not_intel():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")


def _avx2_but_not_intel() -> bool:
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return False
    return "GenuineIntel" not in cpu and {"avx2", "fma"} <= set(cpu.split())


def onednn_product() -> Any:
    """(x [N, in], W [out, in]) → x Wᵀ in fp32 on CPUs by oneDNN, from tensors as they lie and into one; None where `@` is not behind it, or it wants them
    in a layout of its own (torch 1). It is that of torch's compiler."""
    import torch

    if stack() == "cu117" or not torch.backends.mkldnn.is_available():
        return None
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x, weight: linear(x, weight, None, "none", [], "")


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
    # DeepSpeed 0.19 calls by its old name what torch 2.13 renamed.
    warnings.filterwarnings("ignore", r".*all_gather_into_tensor` is deprecated.*")
    try:
        trainer.fit(module)
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_interrupt)


def deepspeed_refusal(on_gpu: bool) -> str | None:
    """Why DeepSpeed cannot train here, or None. Those before 0.9 set a CUDA device whatever they are told."""
    if importlib.util.find_spec("deepspeed") is None:
        return (
            "DeepSpeed is not installed; make venv brings it, and --strategy ddp trains on several devices without it"
        )
    if not on_gpu and old_deepspeed():
        version = importlib.metadata.version("deepspeed")
        return f"DeepSpeed {version} trains on GPUs only; on a CPU give --strategy ddp, or take the modern stack (make venv STACK=modern)"
    return None


def import_deepspeed(on_gpu: bool) -> None:
    """DeepSpeed's first import, without torch's remark on a CUDA toolkit that is not needed; on a CPU it then looks for no GPU, and compiles nothing."""
    cpp_extension()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = importlib.import_module("deepspeed")
    if old_deepspeed():
        importlib.import_module("rwkv.deepspeed07").correct()
    elif not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # a minute of g++ while the ranks wait; gloo does as well
        )


def old_deepspeed() -> bool:
    """Whether DeepSpeed is the documented stack's, 0.7.0, or about as old."""
    return importlib.metadata.version("deepspeed").startswith(("0.7.", "0.8."))


def deepspeed_options() -> dict[str, Any]:
    """Keys of DeepSpeed's configuration that its version needs. The throughput timer would wait for the GPU twice in each micro-batch."""
    return {} if old_deepspeed() else {"timers": {"throughput": {"enabled": False}}}


def zero3_recomputes_reentrantly() -> bool:
    """Whether gradient checkpointing under ZeRO-3 needs torch's reentrant form. Under DeepSpeed 0.7.0 the other one's recomputation, which runs inside the
    backward pass of a block's last operation, partitions the block's weights again before their gradients arrive."""
    return old_deepspeed()


def forget_steps(optimizer: "torch.optim.Optimizer") -> None:
    """Put the optimizer back to its first step. DeepSpeed 0.7.0 makes one with zero gradients to have its state allocated, which Adam's bias
    correction would count: the first update would be a quarter too small. Newer ones make none."""
    for group in optimizer.param_groups:
        if "step" in group:  # DeepSpeed's FusedAdam
            group["step"] = 0
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"] * 0


def adam(
    groups: list[dict[str, Any]], decoupled: bool, fused: bool, deepspeed: bool, **options: Any
) -> "torch.optim.Optimizer":
    """torch's Adam, or AdamW if decoupled: where all parameters are on GPUs fused, plain elsewhere and where it is not to be fused.

    A fused one has an attribute found_inf: None, or a tensor of one fp32 number; a step that finds 1 there changes neither weights nor its own state,
    and the host need not know. For DeepSpeed, which asks for its class, it is torch's own; 1.13.1 has no fused AdamW: over lists of tensors (foreach).
    """
    import torch

    kind: Any = (
        torch.optim.AdamW if decoupled else torch.optim.Adam
    )  # torch 1.13.1's stubs know neither foreach nor fused
    if not (fused and on_gpus(groups)):
        return kind(groups, **options)
    if stack() == "cu117" and not deepspeed:
        made = _fused_adam()(groups, decoupled, fused=True, **options)
    elif "fused" not in inspect.signature(kind).parameters:
        return kind(groups, foreach=True, **options)
    else:
        made = kind(groups, fused=True, **options)
    made.found_inf = None
    # It could unscale fp16's gradients itself, wherefore Lightning refuses to clip them, in bf16 too. Scaled they are unscaled before it.
    made._step_supports_amp_scaling = False
    return made


def on_gpus(groups: list[dict[str, Any]]) -> bool:
    """Whether all parameters of an optimizer's groups are."""
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def like_step(number: "torch.Tensor") -> "torch.Tensor":
    """A tensor of one number in the shape that fused Adam's `step` has. It subtracts found_inf from the steps, torch 1.13.1 with a kernel for each parameter
    where their shapes differ."""
    return number.reshape(1 if stack() == "cu117" else ())


def _fused_adam() -> Any:
    """torch 1.13.1's fused Adam with what it lacks: decoupled decay, and found_inf from anybody but a GradScaler."""
    import torch

    class Adam(torch.optim.Adam):
        found_inf: Any = None  # or a tensor of one number

        def __init__(self, groups: list[dict[str, Any]], decoupled: bool, **options: Any):
            super().__init__(groups, **options)
            self.decoupled = decoupled

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()  # in which found_inf may be set
            decays = [group["weight_decay"] for group in self.param_groups]
            if self.decoupled:
                for group in self.param_groups:
                    self._decay(group)
            try:
                super().step(grad_scaler=None if self.found_inf is None else self)  # type: ignore[call-arg]  # not in its stubs
            finally:
                for group, decay in zip(self.param_groups, decays, strict=True):
                    group["weight_decay"] = decay
            return loss

        def _decay(self, group: dict[str, Any]) -> None:
            factor = group["lr"] * group["weight_decay"]
            group["weight_decay"] = 0.0  # it is no part of the gradient
            for parameter in group["params"]:
                if factor and parameter.grad is not None:
                    parameter.mul_(1 - factor if self.found_inf is None else 1 - factor * (1 - self.found_inf))

        # What Adam asks a GradScaler for. Gradients are unscaled by now.
        def _get_scale_async(self) -> torch.Tensor:
            return torch.ones_like(self.found_inf)

        def _check_inf_per_device(self, _: Any) -> dict[torch.device, torch.Tensor]:
            return {self.found_inf.device: self.found_inf}

    return Adam


def grad_scaler() -> Any:
    """torch's class GradScaler, but an optimizer with found_inf (see `adam`) leaves out a step with gradients beyond fp16's range by itself: torch's asks
    before every step whether there are any, and the host waits."""
    import torch

    newer: Any = torch  # than the stubs of 1.13.1
    base: Any = torch.cuda.amp.GradScaler if stack() == "cu117" else newer.amp.GradScaler

    class GradScaler(base):
        def _maybe_opt_step(self, optimizer: Any, state: Any, *arguments: Any, **keywords: Any) -> Any:
            if not hasattr(optimizer, "found_inf"):
                return super()._maybe_opt_step(optimizer, state, *arguments, **keywords)
            given, found = optimizer.found_inf, like_step(sum(state["found_inf_per_device"].values()))
            optimizer.found_inf = found if given is None else torch.maximum(given, found)
            try:
                return optimizer.step(*arguments, **keywords)
            finally:
                optimizer.found_inf = given

    return GradScaler


def deepspeed_ops() -> dict[str, str]:
    """DeepSpeed's ops that were compiled when it was installed, each with why it does not load; empty if it does. cpu_adam wants libcurand, which
    is in no wheel that torch asks for."""
    import torch  # noqa: F401  # brings the libraries that they link to

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
    """DeepSpeed's Adam for a GPU, or for the CPU if offloaded, where it was compiled when DeepSpeed was installed, and loads; else None."""
    if deepspeed_ops().get("cpu_adam" if offloaded else "fused_adam", "not there"):
        return None
    adam = importlib.import_module("deepspeed.ops.adam")
    return (
        functools.partial(adam.DeepSpeedCPUAdam, adamw_mode=True)
        if offloaded
        else functools.partial(adam.FusedAdam, adam_w_mode=True)
    )


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
    newer: Any = torch  # than the stubs of 1.13.1
    return newer.get_autocast_dtype(device) if newer.is_autocast_enabled(device) else None


@functools.cache
def stack() -> str:
    """The stack that this Python has, by its torch: the name of its lock in env/locks/."""
    return "cu117" if importlib.metadata.version("torch").startswith("1.") else "modern"


def pythons() -> list[str]:
    """Pythons that the stack is locked for."""
    return ["3.10"] if stack() == "cu117" else ["3.10", "3.11", "3.12", "3.13"]


def drivers() -> dict[str, tuple[int, int]]:
    """For each major CUDA version the oldest NVIDIA driver that runs its later minor versions too, and the driver that our version of it came with."""
    lines = Path(__file__).with_name("drivers.txt").read_text(encoding="utf-8").splitlines()
    return {
        major: (int(oldest), int(own))
        for major, oldest, own, _ in (line.split() for line in lines if not line.startswith("#"))
    }


def storage(tensor: Any) -> Any:
    """What holds a tensor's bytes: torch 2 calls it untyped, and warns where it is asked for as torch 1 does."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


def untyped_storage(tensor: Any) -> Any:
    """A tensor's storage as bytes, which torch 1 has behind the typed one."""
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage().untyped()
