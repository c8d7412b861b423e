"""NaN in a run, and the norm of the gradient; metrics are read one step late on GPUs."""

import re

import pytest
import torch

from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.dataset import Contexts
from rwkv.data.token_stream import Stream
from rwkv.errors import UserError
from rwkv.train.callbacks import metrics
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from tests.train.small_runs import SMALL, TUNE, lines, poisoned


def test_nan_loss_names_batch(make_base, make_data, tmp_path):
    flags = poisoned(make_base, tmp_path)
    with pytest.raises(UserError) as caught:
        fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), save_every=1))
    printed = re.fullmatch(
        r"step (\d+): the loss is nan, in the batch of samples (\d+) to \d+ \(tokens (\d+) to (\d+), (\d+) to (\d+) of the data\)\. Lower --lr_init, .*"
        r"--on_nan skip; the last valid state is .*/step-(\d+)\.pt; to resume .*",
        str(caught.value),
    )
    step, sample, a, b, c, d, good = map(int, printed.groups())
    assert step > 1
    assert (good, sample) == (step - 1, 2 * (step - 1))
    assert a <= 105 < b or c <= 105 < d
    assert lines(tmp_path / "run")[-1]["loss"] is None


def test_deferred_metrics_match_immediate(make_base, make_data, tmp_path, monkeypatch):
    """On a GPU the metrics of a step are read after the next step is launched; here a CPU does so
    too.
    """
    flags, data = poisoned(make_base, tmp_path), make_data(500)
    read, found, printed = [], [], []
    read_metrics = metrics.Metrics._read

    def recording_read(self, trainer, module, pending):
        read.append(module.step - pending.line["step"])
        read_metrics(self, trainer, module, pending)

    monkeypatch.setattr(metrics.Metrics, "_read", recording_read)
    for late in (False, True):
        monkeypatch.setattr(metrics, "reads_one_step_late", lambda device, late=late: late)
        read.clear()
        fit(TrainConfig(**SMALL | {"epoch_count": 2}, data_file=data, proj_dir=str(tmp_path / f"run{late}")))
        assert set(read) == ({0, 1} if late else {0})
        timed = ("tokens_per_s", "peak_mib", "rss_peak_mib")
        found.append(
            [{key: value for key, value in line.items() if key not in timed} for line in lines(tmp_path / f"run{late}")]
        )
        with pytest.raises(UserError) as caught:
            fit(TrainConfig(**flags, proj_dir=str(tmp_path / f"nan{late}"), save_every=1000))
        printed.append(str(caught.value))
        assert lines(tmp_path / f"nan{late}")[-1]["loss"] is None
        assert not list((tmp_path / f"nan{late}").glob("rwkv-*.pth"))
    assert found[0] == found[1]
    assert printed[0] == printed[1]


def test_on_nan_skip(make_base, tmp_path):
    flags = poisoned(make_base, tmp_path)
    result = fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), on_nan="skip"))
    skipped = [line["step"] for line in lines(tmp_path / "run") if line["loss"] is None]
    assert 0 < len(skipped) < result.steps == 12
    weights, before = read_tensors(result.checkpoint), read_tensors(flags["load_model"])
    assert all(value.isfinite().all() for name, value in weights.items() if name != "emb.weight")
    assert not torch.equal(weights["head.weight"], before["head.weight"])
    assert {int(moments["step"]) for moments in state_files.newest(tmp_path / "run").optimizer.values()} == {
        12 - len(skipped)
    }
    tensors = read_tensors(flags["load_model"])
    tensors["ln_out.weight"][:] = 3e38  # every step overflows
    torch.save(tensors, tmp_path / "lost.pth")
    with pytest.raises(UserError, match="step 21: .* 21 consecutive steps"):
        fit(
            TrainConfig(
                **flags | {"load_model": str(tmp_path / "lost.pth"), "epoch_steps": 30},
                proj_dir=str(tmp_path / "b"),
                on_nan="skip",
            )
        )


def test_grad_norm_matches_torch(make_base, make_data, tmp_path):
    base, data = make_base(), make_data(200)
    fit(
        TrainConfig(
            **TUNE | {"max_steps": 1, "grad_clip": 0.01},
            load_model=str(base),
            data_file=data,
            proj_dir=str(tmp_path / "run"),
        )
    )
    model = load_model(base)
    stream = Stream(Dataset(data))
    x, y = zip(*(Contexts(stream, 8, 8, seed=1)[i] for i in range(2)), strict=True)
    logits, _ = model(torch.stack(x))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(y).flatten()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert lines(tmp_path / "run")[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)  # L2Wrap adds less
