"""Shared fixtures: a tiny model, tiny data, the command line."""

import contextlib
import fcntl
import gc
import json
import locale
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tokenizers
import torch

from rwkv import checkpoint, compat
from rwkv.data.binidx import Dataset, mask_path
from rwkv.data.binidx_writer import writer
from rwkv.data.token_stream import Stream
from rwkv.kernels import build
from rwkv.models import RWKV
from rwkv.models.version import VERSIONS
from rwkv.train.runtime.lightning import rank_zero_only
from rwkv.train.runtime.process import denormals_are_flushed
from tests import forked
from tests.waiting import LIMIT

ROOT = Path(__file__).parents[1]
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # set by `make test`; tests run make themselves
    os.environ.pop(_name, None)
compat.enable_mkl_avx2()  # as training does: tests compare runs in this process and in others bit for bit
# No deadline: an fsync to a busy disk may be slow. Derandomized: the same examples in every run.
hypothesis.settings.register_profile("rwkv", deadline=None, derandomize=True)
hypothesis.settings.load_profile("rwkv")
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Shells start background jobs with SIGINT ignored, nohup with SIGHUP; the signal tests need both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
SET_BY_OTHERS = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # the second by importing torch._dynamo


def pytest_collection_finish() -> None:
    """Let later garbage collections (DeepSpeed requests many) skip what is imported now."""
    gc.collect()
    gc.freeze()


def seed() -> None:
    """Seed all random number generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Seed fixtures of several tests: their values do not depend on which test comes first."""
    if fixturedef.scope != "function":
        seed()


def process_state() -> dict[str, object]:
    """Process-wide settings that a test could leave changed for later tests."""
    umask = os.umask(0o022)
    os.umask(umask)
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS},
        "working directory": os.getcwd(),
        "umask": umask,
        "locale": locale.setlocale(locale.LC_ALL),
        "limits": {
            name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE")
        },
        "signal handlers": {number.name: signal.getsignal(number) for number in HANDLED},
        # packages may extend sys.path when imported
        "sys.path": [path for path in sys.path if "site-packages" not in path],
        "rank": rank_zero_only.rank,
        "garbage collection": gc.isenabled(),
        "disabled logging": logging.root.manager.disable,
        "torch threads": torch.get_num_threads(),
        "torch default dtype": torch.get_default_dtype(),
        "torch grad mode": torch.is_grad_enabled(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch matmul precision": torch.get_float32_matmul_precision(),
        "flushing of denormals": denormals_are_flushed(),
        # DeepSpeed cannot recreate its process groups within a process, so they remain.
        "process group": torch.distributed.is_initialized() and "deepspeed" not in sys.modules,
    }


@contextlib.contextmanager
def unchanged(what: str):
    """Fail if the block leaves process-wide state changed."""
    before = process_state()
    yield
    after = process_state()
    changed = {name: f"{before[name]} -> {after[name]}" for name in before if before[name] != after[name]}
    assert not changed, f"{what} changed process-wide state: {changed}"


@pytest.fixture(autouse=True, scope="module")
def _process_state_unchanged_by_module():
    """Fail a module whose module-scoped fixtures leave process-wide state changed. They run before
    the state is read for a test.
    """
    with unchanged("a fixture of the module"):
        yield


@pytest.fixture(autouse=True)
def _process_state_unchanged():
    """Fail a test that leaves process-wide state changed. Every test starts with the same random
    seed, whatever ran before it.
    """
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed()
    with unchanged("the test"):
        yield
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def make_model():
    """Create a small model of random parameters. None is zero, so that no gradient vanishes."""

    def make(seed: int = 0, version: str = "4", noise: float = 0.2, **sizes) -> RWKV:
        sizes = {"n_layer": 2, "n_embd": 16, "vocab_size": 50, **({"head_size": 16} if version != "4" else {}), **sizes}
        torch.manual_seed(seed)
        model = RWKV(VERSIONS[version].Sizes(**sizes))
        model.initialise(emb_scale=1e-2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        return model

    return make


@pytest.fixture
def make_base(make_model, tmp_path):
    """Create a checkpoint of a model of `make_model`."""

    def make(name: str = "base.pth", **sizes) -> Path:
        checkpoint.save_model(tmp_path / name, make_model(**sizes), {})
        return tmp_path / name

    return make


@pytest.fixture
def make_data(tmp_path):
    """Create a binidx of random token ids below `vocab`; returns its prefix."""

    def make(tokens: int, vocab: int = 50, name: str = "data", seed: int = 0) -> str:
        ids = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
        with writer(tmp_path / name) as out:
            out.add(ids)
        return str(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def make_stream(tmp_path_factory):
    """Create a token stream over the given documents, with an optional loss mask."""

    def make(documents, mask=None, dtype: str = "uint16", **options) -> Stream:
        prefix = tmp_path_factory.mktemp("stream") / "d"
        with writer(prefix, dtype) as out:
            for document in documents:
                out.add(list(document))
        if mask is not None:
            mask_path(prefix).write_bytes(bytes(mask))
        return Stream(Dataset(prefix), **options)

    return make


@pytest.fixture
def byte_tokenizer(tmp_path):
    """A tokenizer.json like that of the 20B models: NFC, byte-level BPE, <|endoftext|> = 0."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i for i, letter in enumerate(alphabet, 1)}, "He": 257, "ll": 258}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("H", "e"), ("l", "l")]))
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json", {letter: i for i, letter in enumerate(alphabet, 1)}


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory) -> Path:
    """The fake CUDA driver of tests/wkv/fake_gpu.py, compiled once for all test processes."""
    import fake_gpu

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "driver"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libcuda.so.1"
        return library if library.exists() else fake_gpu.build(folder)


@pytest.fixture(scope="module")
def gpu(fake_driver):
    """A process that runs the compiled CUDA kernels on the CPU: a FakeGPU."""
    import fake_gpu

    fake = fake_gpu.FakeGPU(fake_driver)
    fake.call("load", str(build.library()))
    yield fake
    fake.close()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*records, name: str = "text.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def start(tmp_path):
    """Start a script, or another Python file; it is killed when the test ends."""
    started = []

    def start(path: str | Path, *arguments, **options) -> forked.Process:
        started.append(forked.Process([ROOT / "scripts" / path, *arguments], tmp_path, **options))
        return started[-1]

    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def two_ranks(start):
    """Run a script in two processes of one run, as a launcher without a store does; returns what
    both printed.
    """

    def run(path: str | Path, *arguments, status: int = 0, **environment) -> str:
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port()), **environment}
        common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        started = [
            start(path, *arguments, "--devices", 2, environment=common | {"RANK": rank, "LOCAL_RANK": rank})
            for rank in "01"
        ]
        results = [process.result() for process in started]
        assert [result.returncode for result in results] == [status] * 2, results
        return "".join(result.stdout + result.stderr for result in results)

    return run


@pytest.fixture
def script(start, tmp_path):
    """Run a script as a user does. An unexpected exit status fails the test with the script's
    output. `fresh`: start a new Python, instead of forking it (tests/forked.py).
    """

    def run(
        name: str, *arguments, status: int = 0, stdin: str = "", environment: dict | None = None, fresh: bool = False
    ) -> subprocess.CompletedProcess:
        if fresh:
            command = [sys.executable, ROOT / "scripts" / name, *arguments]
            result = subprocess.run(
                [str(word) for word in command],
                input=stdin,
                capture_output=True,
                text=True,
                cwd=tmp_path,
                env=environment,
                timeout=LIMIT,
                check=False,
            )
        else:
            result = start(name, *arguments, stdin=stdin, environment=environment).result()
        assert result.returncode == status, f"{name} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run
