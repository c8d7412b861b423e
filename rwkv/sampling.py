"""Sampling of the next token: temperature, top-p, penalties; for one sequence or a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv.errors import UserError

_COLDEST = 1e-4  # temperature, in effect greedy; logits divided by a smaller one may overflow
_LIKELIEST = 256  # candidates that are sorted first: they nearly always suffice, and sorting 65536 is slow


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy. Penalties are those of ChatRWKV: presence +
    frequency · count, with counts multiplied by `penalty_decay` after every token."""

    temperature: float = 1.0
    top_p: float = 0.85
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996

    def count(self, counts: Mapping[int, float], token: int) -> dict[int, float]:
        """The decayed counts after a further token."""
        after = {t: c * self.penalty_decay for t, c in counts.items()}
        after[token] = after.get(token, 0.0) + 1
        return after


def check_sampling(sampling: Sampling, max_tokens: int, seed: int) -> None:
    """Validate the sampling flags.

    Raises:
        UserError: a flag is out of range.
    """
    for name, value, valid, expected in (
        (
            "temperature",
            sampling.temperature,
            sampling.temperature >= 0,
            "at least 0 (0: always the most likely token)",
        ),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "greater than 0 and at most 1"),
        ("penalty_decay", sampling.penalty_decay, 0 <= sampling.penalty_decay <= 1, "from 0 to 1"),
        (
            "presence_penalty",
            sampling.presence_penalty,
            abs(sampling.presence_penalty) <= 100,
            "from -100 to 100, usually 0 to 2",
        ),
        (
            "frequency_penalty",
            sampling.frequency_penalty,
            abs(sampling.frequency_penalty) <= 100,
            "from -100 to 100, usually 0 to 2",
        ),
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("seed", seed, -1 <= seed < 1 << 63, "-1 (a new seed each time), or from 0 to 2^63 - 1"),
    ):
        if not valid:
            raise UserError(f"--{name} {value}: it must be {expected}")


def sample_token(
    logits: Tensor, sampling: Sampling, counts: Mapping[int, float], generator: torch.Generator | None = None
) -> int:
    """Sample the next token from logits [V]; `counts` are the decayed counts of earlier tokens."""
    return sample_tokens(logits[None], [sampling], [counts], [generator])[0]


def sample_tokens(
    logits: Tensor,
    samplings: Sequence[Sampling],
    counts: Sequence[Mapping[int, float]],
    generators: Sequence[torch.Generator | None],
) -> list[int]:
    """Sample the next token of each sequence from logits [B, V].

    A sequence with temperature > 0 draws one number from its generator (of any device), so what it
    samples does not depend on the other sequences.

    Args:
        counts: decayed counts of each sequence's earlier tokens.
        generators: None: torch's default generator.
    """
    logits = _penalised(logits, samplings, counts)
    tokens = logits.max(-1)[1].tolist()  # faster than argmax
    drawing = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawing:
        return tokens
    rows = logits if len(drawing) == len(logits) else logits[drawing]
    temperatures = [max(samplings[i].temperature, _COLDEST) for i in drawing]
    rows = rows / torch.tensor(temperatures, device=rows.device)[:, None]
    total = rows.logsumexp(-1, keepdim=True)
    values, candidates = rows.topk(min(_LIKELIEST, rows.shape[-1]), -1)  # in descending order
    likeliest, candidates = (values - total).exp().cpu().double().numpy(), candidates.cpu()
    for row, i in enumerate(drawing):
        u = float(_uniform(generators[i]))
        top_p, whole = samplings[i].top_p, likeliest.shape[-1] == rows.shape[-1]
        index = _sampled_index(likeliest[row], top_p, u, whole)
        if index is not None:
            tokens[i] = int(candidates[row, index])
            continue
        ordered, order = (rows[row] - total[row]).sort(descending=True)
        tokens[i] = int(order[_sampled_index(ordered.exp().cpu().double().numpy(), top_p, u, True)])
    return tokens


def _uniform(generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.rand((), generator=generator, device=device, dtype=torch.float64)


def _sampled_index(probabilities: np.ndarray, top_p: float, u: float, whole: bool) -> int | None:
    """The index of the sampled token in descending probabilities [K]: the most likely tokens up
    to a sum of top_p are kept, always at least one; u, in [0, 1), selects one of them. None if more
    probabilities are needed; `whole`: there are no more.
    """
    sums = probabilities.cumsum()
    kept = int((sums - probabilities < top_p).sum())
    if top_p >= 1:
        mass, kept = float(sums[-1]) if whole else 1.0, len(sums)
    elif kept == len(sums) and not whole and float(sums[-1]) < top_p:
        return None
    else:
        kept = max(kept, 1)
        mass = float(sums[kept - 1])
    index = int(np.searchsorted(sums[:kept], u * mass, side="right"))
    if index == len(sums) and not whole:
        return None
    return min(index, kept - 1)


def _penalised(logits: Tensor, samplings: Sequence[Sampling], counts: Sequence[Mapping[int, float]]) -> Tensor:
    """The logits in fp32, minus the penalties."""
    rows, columns, penalties = [], [], []
    for i, sampling in enumerate(samplings):
        if sampling.presence_penalty or sampling.frequency_penalty:
            for token, count in counts[i].items():
                rows.append(i)
                columns.append(token)
                penalties.append(-sampling.presence_penalty - sampling.frequency_penalty * count)
    logits = logits.float()
    if not rows:
        return logits
    where = torch.tensor(rows, device=logits.device), torch.tensor(columns, device=logits.device)
    return logits.index_put(where, torch.tensor(penalties, device=logits.device), accumulate=True)
