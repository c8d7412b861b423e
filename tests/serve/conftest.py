"""Models that several test modules serve."""

import pytest

from rwkv.serve import served
from tests.serve import models


@pytest.fixture(scope="session")
def loaded(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    base = models.base(make_model, folder, "7", models.WORLD)
    tuned = models.adapter(folder / "tuned.pth", base, ["att", "ffn"])
    return served.load(str(base), "base", {"tuned": str(tuned)})
