"""Evaluate models and adapters on text, on a run's validation set, or on benchmark tasks.

    # loss, perplexity and bits per byte of the base and of two adapters
    python scripts/evaluate.py --model base.pth --lora out/lora/rwkv-0.pth,out/lora/rwkv-best.pth \\
        --data_file test.jsonl
    # the part of the data that the run did not train on
    python scripts/evaluate.py --model base.pth --lora out/lora/rwkv-best.pth --run out/lora
    # tasks of lm-evaluation-harness (make lm-eval installs it)
    python scripts/evaluate.py --model base.pth --tasks lambada_openai
"""

import contextlib
import math
import tempfile
from pathlib import Path

from rwkv.cli import parse, report_errors
from rwkv.config import EvaluateConfig
from rwkv.errors import UserError, printable


def main(config: EvaluateConfig) -> None:
    from rwkv import compat
    from rwkv.evaluation import harness, inputs, models, table
    from rwkv.files import atomic_write, json_text
    from rwkv.train.resume import run_manifest

    wanted = models.check(config)
    inputs.check(config)
    compat.enable_mkl_avx2()
    if config.tasks:
        harness.check(config)
    manifest = run_manifest.read(Path(config.run)) if config.run else None
    if config.run and manifest is None:
        raise UserError(f"--run {config.run}: no {run_manifest.NAME} in this folder, so it is not the folder of a run")
    writing = atomic_write(config.output) if config.output else contextlib.nullcontext()
    with writing as file:  # fails before the work if the file cannot be written
        with tempfile.TemporaryDirectory(prefix="rwkv-evaluate-") as temporary:
            data = inputs.of_run(manifest, Path(config.run)) if manifest else inputs.of_files(config, Path(temporary))
            models.check_vocabularies(wanted, data)
            results = [models.evaluate(config, one, data) for one in wanted]
        if data:
            context = f"windows of {config.ctx_len:,} tokens" if config.ctx_len else "whole documents"
            print(printable(f"loss in nats per token, on {context}\n"))
            print("\n".join(map(printable, table.losses(results).splitlines())))
        if config.tasks:
            print(("\n" if data else "") + "\n".join(map(printable, table.tasks(results).splitlines())))
        if file:
            flags = {name: value for name, value in vars(config).items() if name != "output"}
            found = {"flags": flags, "models": [_finite(result.as_json()) for result in results]}
            file.write_text(json_text(found), encoding="utf-8")


def _finite(value):
    """Replace NaN, which JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    with report_errors():
        main(parse(EvaluateConfig, __doc__))
