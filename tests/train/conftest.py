"""Training in tests writes loss.png without drawing it, which takes longer than the few steps of
most runs.
"""

from unittest import mock

import pytest

from rwkv import plots

_SAVE = plots.save


@pytest.fixture(autouse=True, scope="module")
def _drawing_off():
    with mock.patch.object(plots, "save", lambda figure, image: image.touch()):
        yield


@pytest.fixture
def drawing(monkeypatch):
    """Draw loss.png."""
    monkeypatch.setattr(plots, "save", _SAVE)
