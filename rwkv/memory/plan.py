"""The parameters of a run that determine its memory usage."""

from dataclasses import dataclass, replace
from typing import Any, cast

from rwkv import compat
from rwkv.adapters import lora, state
from rwkv.config import EstimateConfig, TrainConfig
from rwkv.kernels import quant
from rwkv.memory.zero import ZEROS
from rwkv.models import Sizes

PROCESS = 290 << 20  # process with torch 1.13.1 and Lightning after a first step, without a model
ENCODER = 233 << 20  # the World tokenizer (rwkv.data.tokenizer), measured on both stacks
WORLD = 65536  # vocabulary size of models with it


@dataclass(frozen=True)
class Plan:
    """A run, as far as its memory usage depends on it.

    Attributes:
        sequences: sequences in a sample, 2 for DPO's pairs.
        dora: whether adapters are DoRA.
        base: dtype of frozen matrices, as --lora_base.
        devices: number of devices on all machines; `per_node`: on one machine.
        gpu: whether they are GPUs.
        bf16_copies: whether trained matrices have copies in bf16 (--bf16_copies).
        graph: whether the blocks run from a CUDA graph (--cuda_graph), whose memory is never freed.
        process: bytes of a process without a model (see PROCESS).
        encoder: bytes of the tokenizer that encodes the questions of --sample_ask.
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
    bf16_copies: bool = False
    strategy: str = "auto"
    devices: int = 1
    per_node: int = 1
    accumulate: int = 1
    ds_bucket_mb: int = 200
    gpu: bool = True
    graph: bool = False
    process: int = PROCESS
    encoder: int = 0

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
    def copied(self) -> bool:
        """Whether matmuls read bf16 copies of fp32 matrices."""
        trained_in_fp32 = not self.lora and not self.stage and self.optimizer == "adam"
        return self.bf16_copies and trained_in_fp32 and self.precision == "bf16"

    @property
    def quantised(self) -> str:
        """nf4, int8 or fp8, if the matrices of the blocks are quantised; else empty."""
        return self.base if self.lora and self.base in quant.KINDS else ""

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


def plan_of(c: TrainConfig | EstimateConfig, sizes: Sizes, gpu: bool, precision: str) -> Plan:
    """The memory plan for these flags. With tbptt_len, its context length is that of one chunk."""
    adapter: dict[str, Any] = {"lora": False}
    if a := (c.adapter if isinstance(c, TrainConfig) else c):
        lora_used = isinstance(c, TrainConfig) or c.method != "full"
        parts = (state.PART,) if getattr(c, "method", "") == "state" else lora.parts_in(a.lora_parts)
        adapter = {"lora": lora_used, "r": a.lora_r, "parts": parts, "dora": a.use_dora, "base": a.lora_base}
        if lora_used and state.PART in parts:
            sizes = replace(cast(Any, sizes), time_state=True)
    return Plan(
        sizes,
        **adapter,
        ctx_len=min(c.ctx_len, getattr(c, "tbptt_len", 0) or c.ctx_len),
        micro_bsz=c.micro_bsz,
        sequences=2 if c.objective == "dpo" else 1,
        precision=precision,
        grad_cp=bool(c.grad_cp),
        optimizer="adam" if c.optimizer == "auto" else c.optimizer,
        release_grads=bool(c.release_grads),
        bf16_copies=bool(c.bf16_copies),
        strategy=c.strategy,
        devices=c.devices * c.num_nodes,
        per_node=c.devices,
        accumulate=c.accumulate_grad_batches,
        ds_bucket_mb=c.ds_bucket_mb,
        gpu=gpu,
        graph=getattr(c, "cuda_graph", "off") == "on",
        process=compat.process_bytes(),
        encoder=ENCODER if getattr(c, "sample_ask", "") and sizes.vocab_size == WORLD else 0,
    )
