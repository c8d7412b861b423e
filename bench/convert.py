"""Benchmark the converter against a pure-Python tokenizer and its own tokenizer library.

    python bench/convert.py [MB]            # speed, on this much text (default 300)
    python bench/convert.py --memory        # peak memory on 100 MB and on 1 GB

The text is the source code of Python's standard library and the installed packages, one document
per file. Measured on two cores:
- scripts/convert.py with two workers, from process start to the files on disk;
- the tokenizer of the PyPI `rwkv` package (make test installs it), as a process that reads the same
  jsonl and writes nothing;
- the library's batch encoding with two threads, of the same texts in memory: no start-up or I/O.
The first and the last are run alternately, and the best time of each is reported.
"""

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
ROUNDS = 5
TRIE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
tokenizer = TRIE_TOKENIZER(sys.argv[1] + "/rwkv/rwkv_vocab_v20230424.txt")
print(sum(len(tokenizer.encode(json.loads(line)["text"])) for line in open(sys.argv[2], encoding="utf-8")))
"""
LIBRARY = """
import json, sys, time
from rwkv import compat
tokenizer, texts, tokens, seconds = compat.rwkv_tokenizer().RWKVTokenizer(), [], 0, 0.0
def encode():
    global tokens, seconds
    started = time.perf_counter()
    ids = tokenizer.encode_batch(texts)
    seconds += time.perf_counter() - started
    tokens += sum(map(len, ids))
    texts.clear()
size = 0
for line in open(sys.argv[1], encoding="utf-8"):
    texts.append(json.loads(line)["text"])
    size += len(line)
    if size > 16e6:
        encode()
        size = 0
encode()
print(tokens, seconds)
"""


def texts() -> Iterator[str]:
    """Source files, repeated endlessly."""
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib"))
    while True:
        for folder in folders:
            for path in sorted(Path(folder).rglob("*.py")):
                with contextlib.suppress(OSError, UnicodeDecodeError):
                    if text := path.read_text(encoding="utf-8"):
                        yield text


def write(path: Path, size: int) -> int:
    """Write jsonl with at least `size` bytes of text; returns the bytes of text written."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in texts():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return written
    return written


def command(source: Path) -> list[str]:
    out = source.with_suffix("")
    return [
        sys.executable,
        str(ROOT / "scripts/convert.py"),
        "--input",
        str(source),
        "--output_prefix",
        str(out),
        "--workers",
        "2",
        "--force",
    ]


def converter(source: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command(source), check=True, capture_output=True)
    return time.perf_counter() - started


def library(source: Path) -> tuple[int, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, str(source)], check=True, capture_output=True, text=True, env=environment
    )
    tokens, seconds = done.stdout.split()
    return int(tokens), float(seconds)


def trie(source: Path) -> tuple[int, float]:
    started = time.perf_counter()
    # -I: import the `rwkv` from PyPI, not ours
    program = [sys.executable, "-I", "-c", TRIE, str(Path(sys.prefix) / "oracle"), str(source)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return int(done.stdout), time.perf_counter() - started


def speed(folder: Path, megabytes: float) -> None:
    source = folder / "bench.jsonl"
    size = write(source, int(megabytes * 1e6)) / 1e6
    if not (Path(sys.prefix) / "oracle").is_dir():
        sys.exit("the PyPI `rwkv` package is missing; make test installs it")
    small = folder / "small.jsonl"
    small.write_text('{"text": "a"}')
    start = min(converter(small) for _ in range(ROUNDS))
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(converter(source))
        tokens, seconds = library(source)
        theirs.append(seconds)
    slow_tokens, slow = trie(source)
    index = (folder / "bench_text_document.idx").stat().st_size
    ends = (index - 42) // 20  # one token per document
    written = (folder / "bench_text_document.bin").stat().st_size // 2 - ends
    assert tokens == slow_tokens == written
    print(f"{size:.0f} MB of text, {tokens:,} tokens, 2 cores; times include process start unless noted")
    print(
        f"converter, 2 workers    {size / min(ours):6.1f} MB/s   best of {', '.join(f'{size / x:.1f}' for x in ours)}; start-up takes {start:.2f} s"
    )
    print(
        f"library batch encoding  {size / min(theirs):6.1f} MB/s   best of {', '.join(f'{size / x:.1f}' for x in theirs)}"
    )
    print(f"pure-Python trie        {size / slow:6.1f} MB/s")
    print(f"converter : trie        {slow / min(ours):6.1f} ×      target: 15")
    print(f"converter : library     {100 * min(theirs) / min(ours):6.0f} %      target: 75")


def memory(folder: Path) -> None:
    for megabytes in (100, 1000):
        source = folder / "bench.jsonl"
        size = write(source, int(megabytes * 1e6)) / 1e6
        child = psutil.Popen(command(source), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = largest = 0.0
        while child.poll() is None:
            try:
                sizes = [process.memory_info().rss / 2**20 for process in [child, *child.children()]]
            except psutil.NoSuchProcess:
                continue
            peak, largest = max(peak, sum(sizes)), max(largest, *sizes)
            time.sleep(0.05)
        assert child.returncode == 0
        print(
            f"{size:5.0f} MB of text: peak {peak:.0f} MiB resident in all processes, {largest:.0f} MiB in the largest"
        )


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["--memory"]:
            memory(Path(folder))
        else:
            speed(Path(folder), float(sys.argv[1]) if sys.argv[1:] else 300)
