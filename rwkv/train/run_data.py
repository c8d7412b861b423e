"""The data of a run, and the manifest that describes it."""

from dataclasses import dataclass
from typing import Any

from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Samples, ValidationSamples
from rwkv.models import RWKV
from rwkv.train import data_source, report, resume_or_start, samples
from rwkv.train.resume import run_manifest
from rwkv.train.run import Run


@dataclass(frozen=True)
class RunData:
    """The data of a run, and the run's manifest."""

    tokens: Dataset
    training: Samples
    validation_samples: ValidationSamples | None
    manifest: dict[str, Any]


def open_data(run: Run, model: RWKV) -> RunData:
    """Open the data of a run, and convert it first if necessary."""
    source = data_source.describe(run.flags)
    manifest = run_manifest.describe(run, source) | {"types": report.types(run.flags, model)}
    resume_or_start.check_source(run, manifest)
    tokens = data_source.open_data(run.flags, run.sizes, source)
    validation = data_source.open_validation(run.flags, run.sizes)
    manifest["data"] = run_manifest.data_of(tokens)
    manifest["validation"] = run_manifest.data_of(validation) if validation else None
    return RunData(tokens, *samples.make(run.flags, tokens, validation), manifest)
