"""Flags of small runs, and what they wrote."""

import json

import torch

from rwkv.checkpoint import read_tensors
from rwkv.data.binidx_writer import writer
from tests.waiting import wait_until

SMALL = {
    "version": "4",
    "n_layer": 2,
    "n_embd": 16,
    "vocab_size": 50,
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 3,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}
ONE_LAYER = {
    "n_layer": 1,
    "version": "4",
    "n_embd": 8,
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 2,
    "epoch_count": 1,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}
TUNE = {key: value for key, value in SMALL.items() if key not in ("version", "n_layer", "n_embd", "vocab_size")}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder, name="loss"):
    """A value of every line that has it."""
    return [line[name] for line in lines(folder) if name in line]


def losses(folder):
    return column(folder, "loss")


def assert_same_tensors(one, other):
    """Two checkpoints have the same tensors, bit for bit."""
    first, second = read_tensors(one), read_tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def wait_for_steps(folder, count, process):
    """Wait until a running process has logged `count` steps."""
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and path.read_text().count("\n") >= count, process)


def poisoned(make_base, tmp_path):
    """Flags with a base whose embedding of token 49 overflows in the first norm, and data with that
    token once.
    """
    tensors = read_tensors(make_base())
    tensors["emb.weight"][49] = 3e38  # finite, as load_model requires; the sum overflows
    torch.save(tensors, tmp_path / "nan.pth")
    with writer(tmp_path / "data") as out:
        out.add([i % 40 for i in range(105)] + [49] + [i % 40 for i in range(94)])
    return {**TUNE, "load_model": str(tmp_path / "nan.pth"), "data_file": str(tmp_path / "data"), "magic_prime": 23}
