"""Conversion on a local Ray cluster of two nodes: the same files as on one machine, also if a
worker or node is killed. Skipped if Ray is not installed (make ray).
"""

import contextlib
import gzip
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rwkv.config import ConvertConfig
from rwkv.data.convert import pipeline, ray_pool
from rwkv.data.convert.pool import in_order
from rwkv.errors import UserError
from tests import forked
from tests.waiting import LIMIT, wait_until

ROOT = Path(__file__).parents[3]
PROGRAMS = Path(__file__).with_name("ray_programs.py")
OPTIONS = {
    "RAY_health_check_period_ms": "500",  # the death of a node is noticed within seconds
    "RAY_health_check_failure_threshold": "4",
    "RAY_prestart_worker_first_driver": "0",  # without the runtime environment they would not be used
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray kills workers when the machine's memory is nearly full, whoever uses it
    "RAY_memory_monitor_refresh_ms": "0",
}


def descendants(pid):
    """(process id, command line) of all processes below a process."""
    children = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append((int(path.name), (path / "cmdline").read_bytes().decode()))
    found, new = [], [pid]
    while new:
        below = [child for one in new for child in children.get(one, [])]
        found, new = found + below, [child for child, _ in below]
    return found


class Cluster:
    """Nodes of a Ray cluster on this machine, each the processes of one `ray start`."""

    def __init__(self, folder):
        self.folder, self.nodes = folder, []
        self.environment = {
            **os.environ,
            **OPTIONS,
            "RAY_TMPDIR": folder,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")]), str(ray_pool.FOLDER)]
            ),
        }
        self.address = f"127.0.0.1:{forked.free_port()}"
        port = self.address.split(":")[1]
        self.start("--head", "--port", port, "--include-dashboard=false", "--no-monitor")
        self.start("--address", self.address)

    def start(self, *arguments):
        """Start a node with one CPU."""
        log = Path(self.folder, f"{len(self.nodes)}.log")
        common = ["--num-cpus", "1", "--object-store-memory", "100000000", "--include-log-monitor=false", "--block"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *common]
        with open(log, "w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=self.environment)
        self.nodes.append(process)

        def ready():
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_until(ready)
        return process

    def program(self, *arguments):
        """Start a program of ray_programs.py."""
        command = [sys.executable, PROGRAMS, *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def stop(self):
        """End all processes."""
        below = [pid for node in self.nodes for pid, _ in descendants(node.pid)]
        for node in self.nodes:
            node.terminate()
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            node.kill()
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster():
    if not importlib.util.find_spec("ray") and not ray_pool.FOLDER.is_dir():
        pytest.skip("Ray is not installed (make ray)")
    folder = tempfile.mkdtemp(prefix="ray")  # not tmp_path: the names of sockets must be short
    cluster = None
    try:
        cluster = Cluster(folder)
        yield cluster
    finally:
        if cluster:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def texts(count):
    draw = random.Random(5)
    words = ["Hello", "你好，世界", "state", "\n", "é", "weights", "User: 1\n\nAssistant: 2"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(count)]


def flags(cluster, input_, prefix, **more):
    return {"input": str(input_), "output_prefix": str(prefix), "ray": cluster.address, **more}


def outputs(folder, prefix):
    """The contents of all files of an output prefix, by the rest of their names."""
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}*")}


def write_inputs(folder):
    """One file of each way in which a chunk's contents are read."""
    folder.mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts(12000)]
    lines[7000] = '{"text": 5}'
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")  # three chunks
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:50]).encode()))
    (folder / "c1.txt").write_text("a text\r\nof two lines")
    (folder / "c2.txt").write_bytes(b"not UTF-8: \xff")
    (folder / "d.csv").write_bytes("text,n\n你好,1\nmore,2\n".encode("gb18030"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts(100)}), folder / "e.parquet")


def test_output_equals_one_machine(cluster, script, tmp_path):
    write_inputs(tmp_path / "in")
    common = ["--input", "in", "--encoding", "gb18030", "--on_error", "skip", "--mask", "answers"]
    alone = script("convert.py", *common, "--output_prefix", "out/alone", "--workers", 1)
    command = [sys.executable, ROOT / "scripts/convert.py", *common, "--output_prefix", "out/spread"]
    result = subprocess.run(
        [*command, "--ray", "auto"],
        cwd=tmp_path,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == alone.stdout.replace("out/alone", "out/spread")
    ours, theirs = outputs(tmp_path / "out", "spread"), outputs(tmp_path / "out", "alone")
    assert set(ours) >= {"_text_document.bin", "_text_mask.bin", "_text_document.json", ".rejects.jsonl"}
    assert ours == theirs
    rejected = [json.loads(line)["place"] for line in ours[".rejects.jsonl"].splitlines()]
    assert rejected == ["in/a.jsonl, line 7001", "in/c2.txt"]


def held_on(node, folder):
    """The processes of a node that hold an encoder."""
    return {pid for pid, _ in descendants(node.pid) if (folder / f"{pid}.held").exists()}


def test_lost_worker_and_node(cluster, tmp_path, write_jsonl):
    """The encoders of three nodes wait. On the third, first the worker is killed, then the whole
    node; the others then convert all chunks.
    """
    path = write_jsonl(*({"text": text} for text in texts(500)))
    pipeline.convert(ConvertConfig(input=str(path), output_prefix=str(tmp_path / "alone"), workers=1))
    node = cluster.start("--address", cluster.address)
    process = cluster.program("hold", json.dumps(flags(cluster, path, tmp_path / "out")), tmp_path)
    try:
        (first,) = wait_until(lambda: held_on(node, tmp_path))
        os.kill(first, signal.SIGKILL)
        (second,) = wait_until(lambda: held_on(node, tmp_path) - {first})
        for pid, command in [*descendants(node.pid), (node.pid, "")]:
            if "raylet" in command or pid in (second, node.pid):
                os.kill(pid, signal.SIGKILL)
        (tmp_path / "release").touch()
        _, printed = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, printed
    finally:
        process.kill()
    assert outputs(tmp_path, "out") == outputs(tmp_path, "alone")


def test_ctrl_c(cluster, tmp_path, write_jsonl):
    path = write_jsonl(*({"text": text} for text in texts(500)))
    (tmp_path / "new").mkdir()
    process = cluster.program("hold", json.dumps(flags(cluster, path, tmp_path / "new/out")), tmp_path)
    try:
        held = wait_until(lambda: len(found := list(tmp_path.glob("*.held"))) == 2 and found)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=LIMIT)
        assert process.returncode == 130, printed
    finally:
        process.kill()
    assert not outputs(tmp_path / "new", "out_")
    wait_until(lambda: not any(Path("/proc", file.stem).exists() for file in held))


def test_errors_in_order(cluster, tmp_path):
    process = cluster.program("errors", cluster.address, tmp_path)
    printed, why = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, why
    found = json.loads(printed)
    assert found["worker"] == [["one"], "the encoder fails"]
    assert found["feed"] == [["one"], "the input ends here"]
    assert found["file"][0] == ["a file"]
    assert "No such file or directory" in found["file"][1]
    assert "missing.txt" in found["file"][1]
    assert f"the node {os.uname().nodename} has orjson " in found["version"][1]
    assert "but this machine 0.1; install the same packages on all nodes" in found["version"][1]


def test_chunks_in_flight():
    begun, done = [], []

    def submit(chunk):
        begun.append(chunk)
        return lambda: chunk * 2

    for chunk, result in in_order(range(50), submit, 6):
        assert result == 2 * chunk
        done.append(chunk)
        assert len(begun) - len(done) < 6
    assert done == begun == list(range(50))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"ray": "auto", "workers": 3},
            "--workers 3: the nodes of a Ray cluster have one worker per CPU; omit the flag",
        ),
        (
            {"ray": "ray://host:10001"},
            "--ray ray://host:10001: run this command on a node of the cluster, with --ray auto",
        ),
    ],
)
def test_flags(write_jsonl, given, message):
    with pytest.raises(UserError, match=message):
        pipeline.convert(ConvertConfig(input=str(write_jsonl({"text": "a"})), **given))


def test_not_installed(write_jsonl, monkeypatch):
    monkeypatch.setattr(ray_pool, "find", lambda: False)
    with pytest.raises(UserError, match="--ray auto: Ray is not installed; install it with .*(make|pip install) ray"):
        pipeline.convert(ConvertConfig(input=str(write_jsonl({"text": "a"})), ray="auto"))
