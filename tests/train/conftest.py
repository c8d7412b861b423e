"""Training in tests creates loss.png without drawing it, which takes longer than the few steps of
most runs.
"""

from unittest import mock

import pytest

from rwkv.config import TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.train.callbacks import metrics
from rwkv.train.fit import fit
from tests.train import finished_run

_PLOT = metrics.plot


@pytest.fixture(autouse=True, scope="module")
def _drawing_off():
    with mock.patch.object(metrics, "plot", lambda curve, image, title, unit: image.touch()):
        yield


@pytest.fixture
def drawing(monkeypatch):
    """Draw loss.png."""
    monkeypatch.setattr(metrics, "plot", _PLOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config and folder of a completed run, to be copied by tests."""
    folder = tmp_path_factory.mktemp("finished")
    with writer(folder / "data") as out:
        out.add([i * i % 50 for i in range(200)])
    config = TrainConfig(
        **finished_run.FLAGS | finished_run.NEW, data_file=str(folder / "data"), proj_dir=str(folder / "run")
    )
    fit(config)
    return config, folder / "run"
