"""A model of this project for lm-evaluation-harness.

The methods are in a separate class, which `lm` combines with lm_eval's base class, so that this
module can be imported without lm_eval.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer
from rwkv.evaluation.scores import token_losses
from rwkv.generate import Sampling, Session
from rwkv.models import RWKV

_MAX_TOKENS = 256  # of a generated answer, if the task sets no limit


def lm(
    model: RWKV, tokenizer: WorldTokenizer | HFTokenizer, batch: int = 8, dtype: torch.dtype | None = None
) -> "RWKVModel":
    """The model as an lm_eval.api.model.TemplateLM, to be passed to lm_eval.simple_evaluate.

    Args:
        batch: texts in a forward pass.
        dtype: of matmuls, if not the weights'.
    """
    from lm_eval.api.model import TemplateLM

    made = type("RWKVLM", (RWKVModel, TemplateLM), {})()
    made.model, made.tokenizer, made.batch, made.dtype = model.eval(), tokenizer, batch, dtype
    return made


class RWKVModel:
    """What lm_eval calls. Every text begins with EOD, as documents in training do, and has no
    maximum length.
    """

    model: RWKV
    tokenizer: Any
    batch: int
    dtype: torch.dtype | None

    @property
    def eot_token_id(self) -> int:
        """The context of a text without one."""
        return self.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text."""
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (…, context, continuation): the log-likelihood of the continuation, and whether
        it is the most likely one.
        """
        eod = self.tokenizer.eod
        # a context of EOD alone is what every text has anyway
        pairs = [([] if context == [eod] else context, rest) for _, context, rest in requests]
        order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), i))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for first in range(0, len(order), self.batch):
            group = order[first : first + self.batch]
            texts = [pairs[i][0] + pairs[i][1] for i in group]
            losses, best = token_losses(self.model, texts, eod, dtype=self.dtype)
            for i, nats, right in zip(group, losses, best, strict=True):
                begin = len(pairs[i][0])
                found[i] = (-float(nats[begin:].sum()), bool(right[begin:].all()))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts."""
        encoded = [((), list[int](), self.tokenizer.encode(request.args[0])) for request in requests]
        return [value for value, _ in self._loglikelihood_tokens(encoded)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, until one of the stop texts or the end of the document."""
        found = []
        for request in requests:
            context, options = request.args
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            sampling = Sampling(temperature, float(options.get("top_p") or 1.0))
            limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _MAX_TOKENS)
            generator = torch.Generator(self.model.emb.weight.device).manual_seed(0)
            session = Session(self.model, self.tokenizer, self.dtype)
            session.read(context)
            found.append("".join(session.write(sampling, limit, [x for x in until if x], generator)))
        return found
