"""Ordered map over chunks on a Ray cluster, with bounded memory; the work of lost workers is
repeated. Ray is optional: `make ray` installs it into a separate folder.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv import commands
from rwkv.data.convert import inputs
from rwkv.data.convert.pool import AHEAD, attempt, in_order
from rwkv.errors import UserError

FOLDER = Path(sys.prefix) / "ray"  # where `make ray` installs it
_RETRIES = 3  # of a chunk whose worker was lost
_PACKAGES = ("rwkv-tokenizer", "pyrwkv-tokenizer", "tokenizers", "orjson", "ftfy", "jinja2")
"""The packages that affect the output."""
_ADVICE = "use smaller documents, or fewer CPUs per node (ray start --num-cpus)"


class RayPool:
    """Applies a function to chunks on a Ray cluster, as `Pool` does in processes of this machine.

    This process reads the sources; chunks are sent with their contents. The nodes get the function
    and this package from here, and must have the same Python and packages.

    Args:
        address: "auto", "local" or HOST:PORT, see ConvertConfig.ray.
        keys: see `inputs.loaded`.
        workers: number of processes for "local"; 0: one per core.

    Raises:
        UserError: on entry if Ray is not installed, or the cluster cannot be reached or has no
            CPUs.
    """

    def __init__(self, function: Callable[[Any], Any], address: str, keys: Sequence[str], workers: int = 0):
        if workers and address != "local":
            raise UserError(
                f"--workers {workers}: the nodes of a Ray cluster have one worker per CPU; omit the flag, or start nodes with"
                " ray start --num-cpus"
            )
        if "://" in address:
            raise UserError(
                f"--ray {address}: run this command on a node of the cluster, with --ray auto (Ray Client is not supported)"
            )
        self._function, self._address, self._keys, self._workers = function, address, keys, workers

    def __enter__(self) -> "RayPool":
        self._ray = _import(self._address)
        try:
            self._connect()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *_):
        self._ray.shutdown()  # ends the tasks of this process on all nodes

    def map(self, chunks: Iterable[inputs.Chunk]) -> Iterator[tuple[inputs.Chunk, Any]]:
        """Yield (chunk, result) as `Pool.map`.

        Raises:
            UserError: a worker was lost several times with the same chunk, or the cluster was.
        """
        return in_order(chunks, self._submit, AHEAD * self._cpus)

    def _connect(self) -> None:
        local = {"num_cpus": self._workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
        package = Path(inputs.__file__).parents[2]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self._ray.init(
                    self._address,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    runtime_env={"py_modules": [str(package)], "excludes": ["kernels/lib", "__pycache__"]},
                    **(local if self._address == "local" else {}),
                )
        except Exception as error:  # of many types
            raise UserError(
                f"--ray {self._address}: cannot connect ({_first_line(error)}); this machine must be a node of the cluster, with"
                f" the same Python and Ray: {_start('start --address HOST:PORT')}"
            ) from error
        self._cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if not self._cpus:
            raise UserError(f"--ray {self._address}: the cluster has no CPUs; add a node, or start one with --num-cpus")
        self._shared = [self._ray.put(self._function)]  # in a list, tasks get the reference
        self._task = self._ray.remote(num_cpus=1, max_retries=_RETRIES)(_work)

    def _submit(self, chunk: inputs.Chunk) -> Callable[[], Any]:
        try:
            reference = self._task.remote(self._shared, _versions(), inputs.loaded(chunk, self._keys))
        except (UserError, OSError) as error:  # of the input: to be raised after the results before it
            return functools.partial(_raise, error)
        return functools.partial(self._result, reference)

    def _result(self, reference: Any) -> Any:
        try:
            ok, result = self._ray.get(reference)
        except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
            raise UserError(
                f"a worker of the Ray cluster was killed {_RETRIES + 1} times with the same documents, probably out of memory; {_ADVICE}"
            ) from error
        except self._ray.exceptions.RayError as error:
            raise UserError(
                f"--ray {self._address}: the Ray cluster failed ({_first_line(getattr(error, 'cause', None) or error)}); check it with"
                f" {_start('status')}, and convert again"
            ) from error
        if not ok:
            raise result
        return result


def find() -> bool:
    """Make Ray importable, also in processes started from this one; returns whether it is
    installed.
    """
    if not _installed() and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(FOLDER)]))
        importlib.invalidate_caches()
    return _installed()


def _installed() -> bool:
    found = importlib.util.find_spec("ray")
    return found is not None and found.origin is not None  # not just a folder of this name


def _import(address: str) -> Any:
    if not find():
        how = "it is not in the image: run this job outside the container, after make ray"
        if not os.environ.get("RWKV_CONTAINER"):
            make = commands.target("ray")  # with PY=, a Python that is not this project's
            how = f"install it with {f'{sys.executable} -m pip install ray' if 'PY=' in make else make}"
        raise UserError(f"--ray {address}: Ray is not installed; {how}")
    # read by Ray; by default it sends statistics, and repeats what runs out of memory forever
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))
    import ray

    return ray


def _start(arguments: str) -> str:
    make = commands.target("ray")
    return f"ray {arguments}" if "PY=" in make else f'{make} ARGS="{arguments}"'


def _raise(error: Exception) -> Any:
    raise error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _work(shared: list[Any], versions: dict[str, str], chunk: inputs.Chunk) -> tuple[bool, Any]:
    """The task of a worker: the function's result, or the exception that it raised."""

    def run(chunk: inputs.Chunk) -> Any:
        if versions != (here := _versions()):
            name = next(name for name in versions if versions[name] != here[name])
            raise UserError(
                f"the node {os.uname().nodename} has {name} {here[name]}, but this machine {versions[name]}; install the same"
                " packages on all nodes"
            )
        return _loaded(shared[0])(chunk)

    return attempt(run, chunk, _ADVICE)


@functools.lru_cache(maxsize=1)
def _loaded(reference: Any) -> Callable[[Any], Any]:
    import ray

    return ray.get(reference)


@functools.lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    """Versions of the packages that affect the output."""
    found = dict.fromkeys(_PACKAGES, "missing")
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
