"""lm-evaluation-harness with a model of this project (--tasks). It is optional: `make lm-eval`
installs it into a separate folder, so that the locked environment does not change.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rwkv.commands import target
from rwkv.config import EvaluateConfig
from rwkv.data.tokenizer import HFTokenizer, WorldTokenizer
from rwkv.errors import UserError
from rwkv.evaluation import lm_eval_model
from rwkv.models import RWKV

FOLDER = Path(sys.prefix) / "lm_eval"  # where `make lm-eval` installs it


def find() -> bool:
    """Make lm_eval importable; returns whether it is installed."""
    if importlib.util.find_spec("lm_eval") is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
        importlib.invalidate_caches()
    return importlib.util.find_spec("lm_eval") is not None


def check(c: EvaluateConfig) -> None:
    """Raise UserError if lm-evaluation-harness is not installed, or does not know the tasks."""
    if not find():
        how = "it is not in the image: run this job outside the container, after make lm-eval"
        if not os.environ.get("RWKV_CONTAINER"):
            make = target("lm-eval")  # with PY=, a Python that is not this project's
            how = f"install it with {f'{sys.executable} -m pip install lm-eval' if 'PY=' in make else make}"
        raise UserError(f"--tasks {c.tasks}: lm-evaluation-harness is not installed; {how}")
    if c.include_path and not os.path.isdir(c.include_path):
        raise UserError(
            f"--include_path {c.include_path}: no such folder; pass the folder with the definition of the task"
        )
    try:
        known = _manager(c)
    except ImportError as error:
        raise UserError(
            f"--tasks {c.tasks}: lm-evaluation-harness is not completely installed ({error}); install it again"
        ) from error
    if unknown := [name for name in _names(c) if not known.match_tasks([name])]:
        raise UserError(
            f"--tasks {c.tasks}: unknown task {unknown[0]}; pass a name of lm-evaluation-harness, or the folder with its definition as --include_path"
        )


def run(c: EvaluateConfig, model: RWKV, dtype: torch.dtype | None) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Evaluate the tasks: (task, metric) → (value, standard error or None).

    Raises:
        UserError: the model's vocabulary is unknown, or the data of a task cannot be loaded.
    """
    from lm_eval import evaluator

    tokenizer = HFTokenizer(c.vocab_file) if c.vocab_file else WorldTokenizer()
    if not c.vocab_file and model.sizes.vocab_size != WorldTokenizer.vocab_size:
        raise UserError(
            f"--tasks needs the model's tokenizer: its {model.sizes.vocab_size} tokens are not the World vocabulary; pass a tokenizer.json as --vocab_file"
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    options: dict[str, Any] = {"num_fewshot": c.num_fewshot} if c.num_fewshot >= 0 else {}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = evaluator.simple_evaluate(
                lm_eval_model.lm(model, tokenizer, c.micro_bsz, dtype),
                tasks=_names(c),
                task_manager=_manager(c),
                limit=c.limit or None,
                bootstrap_iters=1000,
                log_samples=False,
                **options,
            )
    except (OSError, ConnectionError) as error:
        raise UserError(
            f"--tasks {c.tasks}: its data cannot be loaded ({' '.join(str(error).split())[:300]}); connect to huggingface.co once so that it can be downloaded, or name a task of your own with local data (--include_path)"
        ) from error
    return _metrics(found["results"])


def _metrics(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float | None]]:
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, variant = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and comma) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else f"{metric} ({variant})"
            found[task, name] = (float(value), float(error) if isinstance(error, int | float) else None)
    return found


def _names(c: EvaluateConfig) -> list[str]:
    return [name.strip() for name in c.tasks.split(",") if name.strip()]


def _manager(c: EvaluateConfig) -> Any:
    return _manager_of(c.include_path, tuple(_names(c)))


@functools.lru_cache(maxsize=1)
def _manager_of(folder: str, names: tuple[str, ...]) -> Any:
    """The index of tasks: of the folder alone if that is enough, because reading the thousands of
    definitions of lm_eval takes a minute.
    """
    from lm_eval.tasks import TaskManager

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    return TaskManager(include_path=folder or None)
