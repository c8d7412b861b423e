"""Run the blocks of a model in training from a CUDA graph."""

from typing import Literal

import torch
from torch import Tensor, nn

from rwkv import compat
from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.kernels import bf16_copy, load
from rwkv.models import RWKV


def resolve(c: TrainConfig, on_gpu: bool) -> Literal["on", "off"]:
    """ "on" or "off" for --cuda_graph.

    Raises:
        UserError: --cuda_graph on is incompatible with the other flags.
    """
    reason = _why_not(c, on_gpu)
    if c.cuda_graph == "on" and reason:
        raise UserError(f"--cuda_graph on: {reason}")
    automatic = c.cuda_graph == "auto" and compat.cuda_graphs_are_tested()
    return "on" if c.cuda_graph == "on" or (automatic and reason is None) else "off"


def _why_not(c: TrainConfig, on_gpu: bool) -> str | None:
    """Why a CUDA graph cannot be used; None if it can."""
    if not on_gpu:
        return "it needs a GPU; omit --cuda_graph"
    if c.world_size > 1 or c.strategy != "auto":
        return "it needs a single GPU and --strategy auto; omit one of the flags"
    if c.release_grads:
        return "it keeps the memory of all gradients, which --release_grads 1 frees; omit one of the flags"
    if c.tbptt_len:
        return "it is incompatible with --tbptt_len, whose chunks carry the state; omit one of the flags"
    return None


class _Blocks(nn.Module):
    """Everything between the embedding and the head."""

    def __init__(self, model: RWKV):
        super().__init__()
        self.blocks, self.ln_out = model.blocks, model.ln_out
        self._run = model.after_embedding

    def forward(self, x: Tensor, reset: Tensor | None = None) -> Tensor:
        return self._run(x, None, reset)[0]


class GraphedBlocks:
    """The blocks of a model, captured as a CUDA graph at the first call in training and replayed
    afterwards. Batches of another shape run without the graph.

    Gradients of a replay are in memory that the next replay overwrites; see `keep_gradients`.
    """

    def __init__(self, model: RWKV):
        self._model = model
        self._shape: torch.Size | None = None
        self._blocks: _Blocks | None = None  # None also if the kernels are not compiled: no graph then
        self._copied: list[nn.Parameter] = []  # have copies in bf16 (--bf16_copies), which replays read

    def __call__(self, tokens: Tensor, reset: Tensor | None = None) -> Tensor:
        """tokens [B, T], reset bool [B, T] or None → the head's input [B, T, D]."""
        x = self._model.emb(tokens)
        if self._shape is None:
            self._shape = x.shape
            if load.why_unavailable_on(x.device.index) is None:
                self._blocks = self._captured(x, reset)
        if self._blocks is None or x.shape != self._shape:
            return self._model.after_embedding(x, None, reset)[0]
        bf16_copy.update(self._copied)
        return self._blocks(*((x,) if reset is None else (x, reset)))

    def _captured(self, x: Tensor, reset: Tensor | None) -> _Blocks:
        device, blocks = x.device, _Blocks(self._model).train()
        self._copied = [p for p in blocks.parameters() if bf16_copy.memory(p) is not None]
        bf16_copy.update(self._copied)  # so that the graph does not
        sample = [x.detach().clone().requires_grad_(x.requires_grad)]
        if reset is not None:
            sample.append(torch.zeros_like(reset))
        # Dropout draws seeds also while capturing; a resumed run, which captures at another step,
        # must continue with the same ones. Casts of weights cannot be cached: replays repeat them.
        compat.expect_gradients_of_another_stream()
        dtype = compat.autocast_dtype("cuda")
        with (
            torch.random.fork_rng([device]),
            torch.autocast("cuda", dtype or torch.float32, dtype is not None, cache_enabled=False),
        ):
            torch.cuda.make_graphed_callables(blocks, tuple(sample), **compat.graph_options())
        return blocks

    def keep_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Copy the gradients out of the graph's memory, so that those of further batches can be
        added to them.
        """
        trained = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        for parameter, copy in zip(trained, torch._foreach_mul(gradients, 1.0), strict=True):
            parameter.grad = copy
