"""The GPU report on a machine without a GPU names the parts that failed, and ends with an error."""

import json
import os
import subprocess
import sys

import pytest


def test_parts_that_fail_are_named(root, tmp_path):
    command = [sys.executable, str(root / "bench/gpu/report.py"), "--out", str(tmp_path), "--only", "doctor,wkv7,races"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(root))
    assert done.returncode == 1, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "torch " in report.splitlines()[0]
    assert "| doctor | passed" in report
    for part in ("wkv7", "races"):  # no GPU, no compute-sanitizer
        assert f"| {part} | exit status" in report
        assert (tmp_path / f"{part}.log").exists()
    assert "| steps | not asked for" in report


def test_no_time_left(root, tmp_path):
    command = [sys.executable, str(root / "bench/gpu/report.py"), "--out", str(tmp_path), "--only", "doctor"]
    done = subprocess.run([*command, "--seconds", "3"], capture_output=True, check=False, env=_environment(root))
    assert done.returncode == 1
    assert "| doctor | not run: no time left |" in (tmp_path / "report.md").read_text()


@pytest.fixture
def tables(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "bench" / "gpu"))
    import tables

    yield tables
    del sys.modules["tables"]


def test_tables(tables, tmp_path):
    row = {"name": "a", "ms": 2.0, "host_ms": 1.0, "ahead_ms": 1.5, "tokens_per_s": 1234.0, "mfu": 0.5, "peak_gb": 2.0}
    rows = [row | {"predicted_gb": 1.6}, {"name": "b", "error": "RuntimeError: full"}]
    (tmp_path / "steps.json").write_text(json.dumps({"matmul_tflops": 785.0, "rows": rows}))
    row = {"B": 1, "T": 1024, "H": 12, "dtype": "bfloat16", "forward": 0.3, "backward": 1.2, "forward_floor": 0.1}
    new = {"chunk_forward": 0.1, "chunk_backward": 0.4, "token : chunk": 3.0}
    (tmp_path / "wkv7.json").write_text(json.dumps({"results": [row | new | {"backward_floor": 0.2}]}))
    text = tables.report("a card", {"steps": "passed, 3 s", "wkv7": "passed, 4 s"}, tmp_path)
    assert "| 1, 1024, 12, bfloat16 | 0.300 (3 × floor) | 1.200 (6 × floor) | 0.100 | 0.400 | 3.00 |  |" in text
    assert "| a | 1.5 | 1.0 | 1,234 | 50.0 % | 2.00 | 125 % |" in text
    assert "| b | RuntimeError: full |" in text
    results = tmp_path / "results.md"
    results.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.replace(results, text)
    assert results.read_text() == f"before\n{tables.BEGIN}\n{text}{tables.END}\nafter\n"
    results.write_text("no markers")
    with pytest.raises(SystemExit, match="has no line"):
        tables.replace(results, text)


def test_results_have_the_markers(root, tables):
    text = (root / "docs" / "results.md").read_text(encoding="utf-8")
    assert 0 < text.index(tables.BEGIN) < text.index(tables.END)


def _environment(root):
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
