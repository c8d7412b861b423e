"""A run resumes whatever the contents of metrics.jsonl, and its cost per step does not grow with
the file.
"""

import json
import tracemalloc

import pytest

from rwkv.config import TrainConfig
from rwkv.train.callbacks import metrics
from rwkv.train.callbacks.curve import Curve
from rwkv.train.fit import fit
from rwkv.train.resume import metrics_file


def line(step, /, **other):
    return (
        json.dumps({"step": step, "loss": 5 / step, "grad_norm": 1.0, "lr": 1e-4, "tokens": step} | other).encode()
        + b"\n"
    )


def kept_steps(path, last, begin=0):
    """The steps left in the file, which are also those passed on."""
    found = []
    metrics_file.keep_steps(path, last, begin, found.append)
    steps = [json.loads(raw)["step"] for raw in path.read_bytes().splitlines()]
    assert [x["step"] for x in found] == steps
    return steps


@pytest.mark.parametrize("last", [0, 1, 5, 9, 10, 20])
def test_truncated_in_place_after_step(tmp_path, last):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(map(line, range(1, 11))))
    inode = path.stat().st_ino
    assert kept_steps(path, last) == list(range(1, min(last, 10) + 1))
    assert path.stat().st_ino == inode
    assert [x.name for x in tmp_path.iterdir()] == ["metrics.jsonl"]


WRONG = {
    "garbage": b"garbage\n",
    "blank": b"\n",
    "NULs": b"\0" * 4096 + b"\n",
    "not UTF-8": b'{"step": 4, "loss": 1.0, "lr": 0.1, "x": "\xff"}\n',
    "without loss": b'{"step": 4, "lr": 0.1}\n',
    "without lr": b'{"step": 4, "loss": 1.0}\n',
    "without step": b'{"loss": 1.0, "lr": 0.1}\n',
    "loss is text": line(4, loss="low"),
    "loss is a list": line(4, loss=[1.0]),
    "lr is null": line(4, lr=None),
    "val_loss is true": line(4, val_loss=True),
    "step is a float": line(4.0),
    "step is true": line(4, step=True),
    "step 0": line(4, step=0),
    "a number": b"4\n",
    "an array": b"[4]\n",
    "NaN": b'{"step": 4, "loss": NaN, "lr": 0.1}\n',
    "beyond floats": b'{"step": 4, "loss": 1e999, "lr": 0.1}\n',
    "nested": b"[" * 100_000 + b"\n",
    "half a line and the next one": line(4)[:20] + line(5),
    "one very long": b'{"step": 4, "loss": 1.0, "lr": 0.1, "x": "' + b"x" * (3 << 20) + b'"}\n',
    "repeated": line(2) + line(3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_line_dropped_and_copy_kept(tmp_path, capsys, wrong):
    path = tmp_path / "metrics.jsonl"
    before = line(1) + line(2) + line(3) + WRONG[wrong] + line(6) + line(7) + line(8)
    path.write_bytes(before)
    assert kept_steps(path, 7) == [1, 2, 3, 6, 7]
    assert (tmp_path / "metrics.jsonl.corrupt").read_bytes() == before
    printed = capsys.readouterr().out
    assert "metrics.jsonl.corrupt" in printed
    assert "no line for 2 of the 7 completed steps" in printed
    path.write_bytes(line(3) + WRONG[wrong])
    assert kept_steps(path, 7) == [3]
    assert (tmp_path / "metrics.jsonl.corrupt.2").read_bytes() == line(3) + WRONG[
        wrong
    ]  # the first copy is not overwritten
    assert (tmp_path / "metrics.jsonl.corrupt").read_bytes() == before


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', b"\0" * 5000, b"\xff", line(4)[:-1]])
def test_incomplete_last_line_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + line(3) + tail)
    assert kept_steps(path, 3) == [1, 2, 3]
    assert [x.name for x in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_missing_lines_reported(tmp_path, capsys):
    metrics_file.keep_steps(tmp_path / "metrics.jsonl", 0, 0, lambda line: None)
    assert capsys.readouterr().out == ""
    metrics_file.keep_steps(tmp_path / "metrics.jsonl", 9, 4, lambda line: None)
    assert "no line for 5 of the 5 completed steps" in capsys.readouterr().out
    # steps up to 4 belong to an earlier run
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(line, (1, 2, 5, 6, 9))))
    metrics_file.keep_steps(tmp_path / "metrics.jsonl", 9, 4, lambda line: None)
    assert "no line for 2 of the 5 completed steps" in capsys.readouterr().out


def test_memory_independent_of_length(tmp_path):
    path, peaks = tmp_path / "metrics.jsonl", []
    for count in (10_000, 40_000):  # both more than the capacity of a curve
        path.write_bytes(b"".join(map(line, range(1, count + 1))))
        curve = Curve()
        tracemalloc.start()
        metrics_file.keep_steps(path, count, 0, lambda x, curve=curve: curve.add(x, 0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert curve.count == count
    assert peaks[1] < 3 * peaks[0] < 6_000_000


@pytest.mark.parametrize("wrong", ["garbage", "NULs", "not UTF-8", "without loss"])
def test_resume_with_invalid_line(drawing, make_data, tmp_path, capsys, wrong):
    flags = {
        "n_layer": 1,
        "version": "4",
        "n_embd": 8,
        "vocab_size": 50,
        "ctx_len": 8,
        "micro_bsz": 1,
        "epoch_steps": 4,
        "epoch_count": 2,
        "random_seed": 1,
    }
    config = TrainConfig(
        **flags, accelerator="cpu", precision="fp32", data_file=make_data(200), proj_dir=str(tmp_path / "run")
    )
    fit(TrainConfig(**vars(config) | {"max_steps": 5}))
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], WRONG[wrong], *lines[3:]]))
    fit(config)
    assert [json.loads(x)["step"] for x in path.read_bytes().splitlines()] == [1, 2, 4, 5, 6, 7, 8]
    assert (tmp_path / "run/metrics.jsonl.corrupt").exists()
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    path.write_bytes(path.read_bytes() + WRONG[wrong])
    fit(config)  # nothing left to do
    assert "already complete" in capsys.readouterr().out


def test_constant_cost_per_step(make_data, tmp_path, monkeypatch):
    """The file is read once, when the run resumes, and buffers do not grow with the number of
    steps.
    """
    reads, sizes = [], []
    read, report = metrics_file.read, metrics.Metrics._report
    monkeypatch.setattr(metrics_file, "read", lambda path: (reads.append(path), read(path))[1])

    def recording_report(self, line):
        report(self, line)
        sizes.append(sum(len(x) for x in vars(self).values() if isinstance(x, list | dict)))

    monkeypatch.setattr(metrics.Metrics, "_report", recording_report)
    flags = {
        "n_layer": 1,
        "version": "4",
        "n_embd": 8,
        "vocab_size": 50,
        "ctx_len": 4,
        "micro_bsz": 1,
        "epoch_steps": 150,
        "epoch_count": 1,
        "random_seed": 1,
    }
    config = TrainConfig(
        **flags, accelerator="cpu", precision="fp32", data_file=make_data(200), proj_dir=str(tmp_path / "run")
    )
    fit(TrainConfig(**vars(config) | {"max_steps": 10}))
    sizes.clear()
    reads.clear()
    fit(config)
    assert len(sizes) == 140
    assert max(sizes) <= sizes[0]
    assert len(reads) == 1
