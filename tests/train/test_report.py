"""The coverage that a run reports at its start, against a count of the training samples."""

import itertools
import re

import numpy as np
import pytest

from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
from rwkv.data.token_stream import Stream
from rwkv.train import report, samples

CTX = 16


@pytest.fixture
def data(tmp_path):
    with writer(tmp_path / "d") as out:
        for i in range(300):
            out.add([1 + i % 40] * (3 + 7 * i % 12))
    return Dataset(tmp_path / "d")


@pytest.mark.parametrize("flags", [{}, {"magic_prime": -1}, {"doc_training": 1}], ids=str)
@pytest.mark.parametrize("count", [60, 400])
def test_coverage_matches_count(data, flags, count):
    c = TrainConfig(ctx_len=CTX, micro_bsz=1, epoch_steps=count, epoch_count=1, **flags)
    training, _ = samples.make(c, data)
    seen = np.zeros(len(training.stream), int)
    for number in range(count):
        begin, end = training.window(number)
        seen[begin + 1 : end] += 1  # targets
        seen[begin] += bool(flags.get("doc_training"))
    passes_per_document = [seen[begin:end].mean() for begin, end in itertools.pairwise(Stream(data).document_starts())]
    printed = report._coverage(training, count)
    times = float(re.search(r"([\d.]+) pass", printed)[1])
    assert times == pytest.approx(np.mean(passes_per_document), rel=0.1)  # 300 similar documents; two digits printed
    if not flags:
        missed = re.search(r"about (\d+)% of it is never used", printed)
        assert (int(missed[1]) if missed else 0) == pytest.approx(100 * np.mean(seen == 0), abs=4)
    elif "magic_prime" in flags:
        assert seen.max() <= np.ceil(count / training.prime)
    else:
        assert np.ptp(seen) <= 1
