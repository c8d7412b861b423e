"""Tiny models, an adapter and a tuned state; and a running server."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from rwkv import adapter_files, checkpoint
from rwkv.adapters import lora
from rwkv.serve import app, server
from rwkv.serve.engine import Engine
from rwkv.serve.requests import Event, Request
from rwkv.serve.worker import Worker
from tests.waiting import LIMIT

SIZES = {"n_layer": 2, "n_embd": 32, "vocab_size": 257}
WORLD = {**SIZES, "vocab_size": 65536}


class Bytes:
    """A byte-level tokenizer for SIZES; 0 is EOD."""

    eod = 0

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode_bytes(self, ids) -> bytes:
        return bytes(i - 1 for i in ids if i)


def base(make_model, folder: Path, version: str, sizes: dict = SIZES) -> Path:
    """A checkpoint."""
    path = folder / f"base{version}.pth"
    checkpoint.save_model(path, make_model(version=version, **sizes), {})
    return path


def adapter(path: Path, base: Path, parts: list[str], seed: int = 1) -> Path:
    """A LoRA adapter of random values, which trains `parts`."""
    model = checkpoint.load_model(base)
    torch.manual_seed(seed)
    lora.inject(model, parts, 4, 8)
    for name in lora.adapter_names(model, parts):
        model.get_parameter(name).data += 0.2 * torch.randn_like(model.get_parameter(name))
    adapter_files.save_adapter(path, model, {"r": 4, "alpha": 8.0, "parts": parts}, {})
    return path


def state(path: Path, base: Path) -> dict[str, torch.Tensor]:
    """A file of state tuning with random values; returns its tensors."""
    wkv = [block[1] for block in checkpoint.load_model(base).initial_state(1)]
    torch.manual_seed(3)
    tensors = {f"blocks.{i}.att.time_state": 4 * torch.randn(value.shape[1:]) for i, value in enumerate(wkv)}
    if len(wkv[0].shape) == 3:  # RWKV-4: a numerator, a denominator above 0, and its exponent
        tensors = {name: torch.stack([value[0], value[1].abs(), value[2]]) for name, value in tensors.items()}
    torch.save(tensors, path)
    return tensors


class Collected:
    """The events of a request that is given to an engine without a server."""

    def __init__(self, **request):
        self.text, self.tokens, self.finish, self.error = "", [], "", ""
        self.request = Request(emit=self.add, **request)

    def add(self, event: Event) -> None:
        assert not self.finish, "an event after the last"
        self.text += event.text
        self.tokens += event.tokens
        self.finish, self.error = event.finish, event.error


@contextlib.contextmanager
def serving(engine: Engine, settings: app.Settings | None = None) -> Iterator[str]:
    """Run the real server in threads of this process; yields its URL."""
    listening, worker, ready = server.listen("127.0.0.1", 0), Worker(engine), threading.Event()
    running = server.Server(worker, settings or app.Settings(write=lambda line: None), 5, ready.set)
    thread = threading.Thread(target=running.run, args=([listening],))
    worker.start()
    thread.start()
    try:
        assert ready.wait(LIMIT)
        yield server.url(listening)
    finally:
        running.should_exit = True
        thread.join(LIMIT)
        worker.close()
        assert not thread.is_alive()
