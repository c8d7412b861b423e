"""The settings of a run that determine its memory usage."""

from dataclasses import dataclass

from rwkv.kernels import quant
from rwkv.memory.zero import ZEROS
from rwkv.models import Sizes
from rwkv.models.version import version_of

PROCESS = 290 << 20  # process with torch 1.13.1 and Lightning after a first step, without a model


@dataclass(frozen=True)
class Plan:
    """The parameters of a run that determine its memory usage.

    Attributes:
        sequences: sequences in a sample, 2 for DPO's pairs.
        dora: whether adapters are DoRA.
        base: dtype of frozen matrices, as --lora_base.
        devices: number of devices on all machines; `per_node`: on one machine.
        gpu: whether they are GPUs.
        graph: whether the blocks run from a CUDA graph (--cuda_graph), whose memory is never freed.
        process: bytes of a process without a model (see PROCESS).
    """

    sizes: Sizes
    lora: bool = True
    r: int = 8
    parts: tuple[str, ...] = ("att", "ln", "time")
    dora: bool = False
    ctx_len: int = 1024
    micro_bsz: int = 1
    sequences: int = 1
    precision: str = "bf16"
    grad_cp: bool = False
    base: str = "auto"
    optimizer: str = "adam"
    release_grads: bool = False
    strategy: str = "auto"
    devices: int = 1
    per_node: int = 1
    accumulate: int = 1
    ds_bucket_mb: int = 200
    gpu: bool = True
    graph: bool = False
    process: int = PROCESS

    @property
    def e(self) -> int:
        """Bytes per element in matmuls."""
        return 2 if self.precision in ("bf16", "fp16") else 4

    @property
    def frozen(self) -> int:
        """Bytes per element of a frozen matrix that is not quantised."""
        return 2 if (self.precision if self.base == "auto" or self.quantised else self.base) == "bf16" else 4

    @property
    def matrix(self) -> int:
        """Bytes per element of a matrix that is not quantised, without DeepSpeed."""
        return self.frozen if self.lora else 2 if self.optimizer == "adamw8bit" else 4

    @property
    def quantised(self) -> str:
        """nf4 or int8, if the matrices of the blocks are quantised; else empty."""
        return self.base if self.lora and self.base in quant.KINDS else ""

    @property
    def layers(self) -> set[str]:
        """Matrices of a block that have adapters."""
        return {layer for part in self.parts for layer in version_of(self.sizes).PARTS.layers_of(part)}

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.ctx_len * self.micro_bsz * self.sequences

    @property
    def stage(self) -> int:
        """ZeRO stage; 0 without DeepSpeed."""
        return ZEROS[self.strategy].stage if self.strategy in ZEROS else 0

    @property
    def offload(self) -> bool:
        """Whether the optimizer (in stage 3 also weights) is offloaded to the host."""
        return self.strategy in ZEROS and ZEROS[self.strategy].offload_optimizer
