"""Flags of short runs with several checkpoints, and changes to their folders."""

import shutil

FLAGS = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 3,
    "epoch_save": 1,
    "random_seed": 1,
    "accelerator": "cpu",
}
NEW = {"version": "4", "n_layer": 1, "n_embd": 8, "vocab_size": 50}


def changed(config, **flags):
    return type(config)(**{**vars(config), **flags})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_state(run):
    shutil.rmtree(run / "resume")
