"""Results as tables for a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rwkv.columns import columns
from rwkv.evaluation.scores import Score


@dataclass
class Evaluated:
    """The results of one model.

    Attributes:
        name: shown in the tables.
        model, lora: paths; lora is empty for a model without adapter.
        scores: by input.
        tasks: (task, metric) → (value, standard error or None), of lm-evaluation-harness.
    """

    name: str
    model: str
    lora: str = ""
    scores: dict[str, Score] = field(default_factory=dict)
    tasks: dict[tuple[str, str], tuple[float, float | None]] = field(default_factory=dict)

    @property
    def total(self) -> Score:
        """The sum over all inputs."""
        return sum(self.scores.values(), Score())

    def as_json(self) -> dict[str, Any]:
        """The results for a JSON file."""
        tasks: dict[str, dict[str, Any]] = {}
        for (task, metric), (value, error) in self.tasks.items():
            tasks.setdefault(task, {})[metric] = {"value": value, "stderr": error}
        return {
            "name": self.name,
            "model": self.model,
            "lora": self.lora or None,
            "sources": {name: score.as_json() for name, score in self.scores.items()},
            "all": self.total.as_json() if self.scores else None,
            "tasks": tasks,
        }


def losses(results: Sequence[Evaluated]) -> str:
    """Loss, perplexity and bits per byte: a row for every input and model; with several inputs also
    for all of them. Differences are to the first model.
    """
    rows = [["source", "model", "documents", "tokens", "loss", "perplexity", "bits/byte", "accuracy", "Δ loss"]]
    sources = [(name, [result.scores[name] for result in results]) for name in results[0].scores]
    if len(sources) > 1:
        sources.append(("all", [result.total for result in results]))
    for source, scores in sources:
        for i, (result, score) in enumerate(zip(results, scores, strict=True)):
            bits = score.bits_per_byte
            rows.append(
                [
                    "" if i else source,
                    result.name,
                    f"{score.documents:,}",
                    f"{score.tokens:,}",
                    f"{score.loss:.4f}",
                    f"{score.perplexity:,.3f}",
                    "–" if bits is None else f"{bits:.4f}",
                    f"{score.correct / max(1, score.tokens):.1%}",
                    f"{score.loss - scores[0].loss:+.4f}" if i else "",
                ]
            )
    return columns(rows if len(results) > 1 else [row[:-1] for row in rows], left={0, 1})


def tasks(results: Sequence[Evaluated]) -> str:
    """The results of tasks: a row for every metric, a column for every model."""
    rows = [["task", "metric", *(result.name for result in results)]]
    for task, metric in results[0].tasks:
        cells = []
        for result in results:
            value, error = result.tasks[task, metric]
            cells.append(f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        rows.append([task, metric, *cells])
    return columns(rows, left={0, 1})
