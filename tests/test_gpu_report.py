"""The GPU report on a machine without a GPU names the parts that failed, and ends with an error."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.waiting import LIMIT


def test_parts_that_fail_are_named(root, tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(root / "bench/gpu")!r})
import report
usual = report.parts  # this machine may be slower than those that the limits are for
report.parts = lambda *given: {{name: part._replace(seconds={LIMIT}) for name, part in usual(*given).items()}}
wanted = "time_mix,doctor,wkv7,races"
sys.argv = ["report", "--out", {str(tmp_path)!r}, "--seconds", "{4 * LIMIT}", "--only", wanted]
report.main()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(root))
    assert done.returncode == 1, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert "torch " in report.splitlines()[0]
    assert "| doctor | passed" in report
    assert "| time_mix | passed" in report  # without a GPU its tests are skipped
    assert "RWKV_FUSED" not in report
    for part in ("wkv7", "races"):  # no GPU, no compute-sanitizer
        assert f"| {part} | exit status" in report
        assert (tmp_path / f"{part}.log").exists()
    assert "| steps | not asked for" in report


def test_failing_time_mix_is_switched_off(root, tmp_path):
    """If the kernels of the time-mix fail, the other parts run without them."""
    program = f"""
import os, sys
sys.path.insert(0, {str(root / "bench/gpu")!r})
import report
def parts(out, ptx):
    say = (sys.executable, "-c", "import os; print('fused', os.environ.get('RWKV_FUSED'))")
    broken = (sys.executable, "-c", "raise SystemExit(3)")
    return {{"kernels": report.Part(60, say), "time_mix": report.Part(60, broken), "tests": report.Part(60, say)}}
report.parts = parts
sys.argv = ["report", "--out", {str(tmp_path)!r}]
report.main()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, env=_environment(root), capture_output=True)
    assert done.returncode == 1
    assert [(tmp_path / f"{part}.log").read_text() for part in ("kernels", "tests")] == ["fused None\n", "fused 0\n"]
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"exit status 3, \d+ s; the parts below ran with RWKV_FUSED=0 \|", text)


def test_no_time_left(root, tmp_path):
    (tmp_path / "steps.json").write_text('{"matmul_tflops": 1, "rows": []}')  # of an earlier report
    command = [sys.executable, str(root / "bench/gpu/report.py"), "--out", str(tmp_path), "--only", "doctor"]
    done = subprocess.run([*command, "--seconds", "3"], capture_output=True, check=False, env=_environment(root))
    assert done.returncode == 1
    text = (tmp_path / "report.md").read_text()
    assert "| doctor | not run: no time left |" in text
    assert "Training steps" not in text


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
    (tmp_path / "wkv6.json").write_text(
        json.dumps({"results": [row | new | {"backward_floor": 0.2, "constant": True}]})
    )
    outcomes = {"steps": "passed, 3 s", "wkv6": "passed, 3 s", "wkv7": "passed, 4 s"}
    text = tables.report({"card": "a card", "torch": "2.0"}, outcomes, tmp_path)
    assert text.startswith("a card, torch 2.0.\n")
    assert "| 1, 1024, 12, bfloat16 | 0.300 (3 × floor) | 1.200 (6 × floor) | 0.100 | 0.400 | 3.00 |  |" in text
    decay = "| 1, 1024, 12, bfloat16, constant decay | 0.300 (3 × floor) | 1.200 (6 × floor)"
    assert f"{decay} | 0.100 | 0.400 | 3.00 |" in text
    assert "| a | 1.5 | 1.0 | 1,234 | 50.0 % | 2.00 | 125 % |" in text
    assert "| b | RuntimeError: full |" in text
    (tmp_path / "steps.json").write_text('{"matmul_tflops": 785.0, "rows": [')  # stopped while it wrote
    assert "Training steps" not in tables.report({"card": "a card"}, outcomes, tmp_path)
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


def _write_report(folder, step, kernels, torch="2.0"):
    folder.mkdir()
    conditions = {"card": "a card", "torch": torch, "commit": folder.name}
    (folder / "conditions.json").write_text(json.dumps(conditions))
    rows = [{"name": "LoRA", "ahead_ms": step}, {"name": "full", "error": "RuntimeError: full"}]
    (folder / "steps.json").write_text(json.dumps({"rows": rows}))
    (folder / "elementwise.json").write_text(
        json.dumps([{"shape": "8, 2048", "operation": str(i), "ms": ms} for i, ms in enumerate(kernels)])
    )
    row = {"B": 1, "T": 16, "dtype": "bfloat16", "forward": 1.0, "backward": 2.0}
    (folder / "wkv7.json").write_text(json.dumps({"results": [row]}))


def test_compare_reports_what_is_missing(root, tmp_path):
    for name in ("before", "after"):
        _write_report(tmp_path / name, 1.0, (1.0,))
    steps = tmp_path / "after" / "steps.json"
    rows = json.loads(steps.read_text())["rows"]
    steps.write_text(json.dumps({"rows": rows[1:]}))
    (tmp_path / "after" / "wkv7.json").unlink()
    done = _compare(root, tmp_path / "before", tmp_path / "after")
    missing = "steps: LoRA; wkv7: 1, 16, bfloat16: forward; wkv7: 1, 16, bfloat16: backward"
    assert f"only in the earlier report: {missing}\n" in done.stdout
    assert done.returncode == 0, done.stderr
    steps.write_text(json.dumps({"rows": [{"name": "LoRA", "error": "RuntimeError: out of memory"}]}))
    done = _compare(root, tmp_path / "before", tmp_path / "after")
    assert (done.returncode, done.stderr) == (1, "ended with an error: LoRA (RuntimeError: out of memory)\n")


def _compare(root, before, after):
    command = [sys.executable, str(root / "bench/gpu/compare.py"), str(before), str(after)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("step", "kernels", "slower"),
    [
        (10.9, (1.1, 1.3), ()),  # kernels: 1.2 on average
        (11.1, (1.0, 1.44), ("steps: LoRA",)),
        (9.0, (1.0, 1.8), ("elementwise: 2 kernels, geometric mean",)),
    ],
    ids=["within 10 %", "step", "kernels"],
)
def test_compare(root, tmp_path, step, kernels, slower):
    _write_report(tmp_path / "before", 10.0, (1.0, 1.44))
    _write_report(tmp_path / "after", step, kernels)
    done = _compare(root, tmp_path / "before", tmp_path / "after")
    assert done.returncode == bool(slower), done.stderr
    assert [line.strip().split("  ")[1] for line in done.stdout.splitlines() if line.endswith("SLOWER")] == list(slower)
    assert "1.00  wkv7: 2 kernels, geometric mean" in done.stdout
    assert "full" not in done.stdout


def test_compare_needs_the_same_conditions(root, tmp_path):
    _write_report(tmp_path / "before", 1.0, (1.0,), torch="1.13")
    _write_report(tmp_path / "after", 9.0, (9.0,))
    done = _compare(root, tmp_path / "before", tmp_path / "after")
    assert (done.returncode, done.stdout) == (0, "not compared: torch 1.13 and 2.0\n")
    assert _compare(root, tmp_path / "none", tmp_path / "after").returncode == 0
    assert _compare(root, tmp_path / "after", tmp_path / "none").returncode == 2


def _environment(root):
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
