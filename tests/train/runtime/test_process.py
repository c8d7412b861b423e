"""`fit` as a function leaves the settings of the process as they were."""

import logging
import os
import warnings

import torch

from rwkv.train.runtime import process


def test_settings_restored(monkeypatch):
    monkeypatch.setenv("RWKV_TEST_GIVEN", "1")

    def settings():
        return (
            dict(os.environ),
            torch.get_num_threads(),
            process.denormals_are_flushed(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            len(warnings.filters),
            logging.getLogger("pytorch_lightning").level,
        )

    before = settings()
    with process.restored():
        os.environ |= {"RWKV_TEST_GIVEN": "2", "RWKV_TEST_NEW": "1"}
        torch.set_num_threads(before[1] + 1)  # as Lightning 2 with several ranks
        torch.set_flush_denormal(not before[2])
        torch.set_float32_matmul_precision("high" if before[3] == "highest" else "highest")
        torch.backends.cudnn.allow_tf32 = not before[4]
        warnings.filterwarnings("ignore", "nothing")
        logging.getLogger("pytorch_lightning").setLevel(before[-1] + 1)
        assert all(a != b for a, b in zip(settings(), before, strict=True))
    assert settings() == before
