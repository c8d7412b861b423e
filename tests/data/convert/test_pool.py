"""Worker pool: ordered results and errors; it ends when a worker is killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from rwkv.data.convert.pool import Pool
from rwkv.errors import UserError
from tests.waiting import LIMIT, wait_until

EARLIER: dict[str, list[int]] = {"children": []}


def double(x):
    return 2 * x


def large(x):
    # larger than a pipe's buffer, so that workers are mostly busy sending it
    return bytes(4_000_000)


def stuck(x):
    if x >= 25:  # more than the chunks that are done when the worker is killed
        time.sleep(2 * LIMIT)


@pytest.fixture(autouse=True)
def _earlier_children(monkeypatch):
    """Child processes of earlier tests, such as multiprocessing's resource tracker."""
    monkeypatch.setitem(EARLIER, "children", [])
    EARLIER["children"] = children()


def parent(pid):
    """The parent of a process that is running, else 0."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return int(parent) if state != "Z" else 0


def children():
    """The living child processes that were started during the test."""
    found = {int(path.name) for path in Path("/proc").glob("[0-9]*") if parent(path.name) == os.getpid()}
    return sorted(found - set(EARLIER["children"]))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_in_order(workers):
    with Pool(double, workers) as pool:
        assert list(pool.map(range(100))) == [(i, 2 * i) for i in range(100)]
    assert children() == []


def failing(x):
    if x == 5:
        raise UserError("five")
    return x


@pytest.mark.parametrize("workers", [1, 3])
def test_error_in_order(workers):
    seen = []
    with pytest.raises(UserError, match="five"), Pool(failing, workers) as pool:
        seen += [result for _, result in pool.map(range(100))]
    assert children() == []

    def feed():
        yield from range(4)
        raise UserError("the input ends here")

    with Pool(failing, workers) as pool:
        results = pool.map(feed())
        assert [next(results)[1] for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(UserError, match="the input ends here"):
            next(results)


def unsendable(x):
    return lambda: x


def test_unpicklable_result():
    with pytest.raises(RuntimeError, match="lambda"), Pool(unsendable, 2) as pool:
        list(pool.map(range(3)))


@pytest.mark.parametrize("function", [double, large, stuck])
def test_killed_worker_ends_pool(function):
    """A worker is killed before the first chunk, between chunks or while it sends a result. The
    pool raises, or the other workers have done all chunks, which they cannot if they get stuck.
    """
    draw = random.Random(3)
    for last in [-1, *draw.sample(range(20), 7)]:
        began, results, raised = time.monotonic(), 0, ""
        try:
            with Pool(function, 3) as pool:
                if last < 0:
                    os.kill(draw.choice(children()), signal.SIGKILL)
                for i, _ in pool.map(range(40)):
                    results += 1
                    if i == last:
                        time.sleep(draw.uniform(0, 0.005))
                        os.kill(draw.choice(children()), signal.SIGKILL)
        except UserError as error:
            raised = str(error)
        assert "a worker process was killed" in raised or (results == 40 and function is not stuck)
        assert time.monotonic() - began < LIMIT
        assert children() == []


def test_workers_end_with_killed_parent(tmp_path):
    child = os.fork()
    if not child:
        with Pool(time.sleep, 3) as pool:
            (tmp_path / "workers").write_text(" ".join(map(str, children())))
            list(pool.map([100] * 9))
        os._exit(0)
    file = tmp_path / "workers"
    try:
        wait_until(lambda: file.exists() and len(file.read_text().split()) == 3)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_until(lambda: not any(map(parent, file.read_text().split())))
