"""Check and measure this project on one GPU, and write a report (`make gpu-report`).

    python bench/gpu/report.py [--out FOLDER] [--seconds N] [--ptx FILE] [--only PARTS] [--results]

Each part runs in its own process with a time limit; if one fails, the others still run. If the part
time_mix fails, which tests the CUDA kernels of the time-mix of RWKV-5 to 7, the parts after it run
without them (RWKV_FUSED=0), and the report says so. Written to FOLDER: conditions.json, PART.log,
PART.json, and report.md with the tables, which names the parts that failed or did not run. Those
of an earlier report in FOLDER are deleted first.
--results also replaces the GPU tables in docs/results.md. compare.py compares two such folders.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import tables

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LEAST = 15  # seconds; a part is not started with less time left
RESERVE = 15  # seconds of the limit for starting, ending a part that is stopped, and the report
TIME_MIX = "tests/gpu/test_time_mix_gpu.py"
PARTS = (
    "kernels",
    "time_mix",
    "tests",
    "steps",
    "strategies",
    "elementwise",
    "demo",
    "doctor",
    "wkv4",
    "wkv6",
    "wkv7",
    "ptx",
    "races",
)


class Part(NamedTuple):
    """A command of the report. `seconds`: its limit."""

    seconds: int
    command: tuple[str | Path, ...]
    cwd: Path = ROOT


def parts(out: Path, ptx: Path | None) -> dict[str, Part]:
    """The parts by name, in the order of their value."""
    python = sys.executable
    one_thread = ("env", "OMP_NUM_THREADS=1")  # for each of the workers
    workers = str(min(12, os.cpu_count() or 1))

    def bench(name: str) -> tuple[str | Path, ...]:
        return python, HERE / f"{name}.py", "--json", out / f"{name}.json"

    racecheck = (
        "compute-sanitizer",
        "--tool",
        "racecheck",
        "--kernel-regex",
        "kns=fused_|wkv6_|wkv7_|adamw_",
        "--print-limit",
        "5",
    )
    tests = (python, "-m", "pytest", "tests/gpu", f"--ignore={TIME_MIX}", "-m", "gpu", "-vv")
    found = {
        "kernels": Part(120, (python, "-c", "from rwkv.kernels import build; build.main()")),
        "time_mix": Part(60, (python, "-m", "pytest", TIME_MIX, "-m", "gpu", "-vv")),
        "tests": Part(130, (*one_thread, *tests, "-n", workers)),
        "steps": Part(110, bench("steps")),
        "strategies": Part(70, bench("strategies")),
        "elementwise": Part(40, bench("elementwise")),
        "demo": Part(
            90, ("env", f"PY={python}", f"OUT={Path(tempfile.gettempdir()) / 'rwkv-gpu-demo'}", "scripts/demo.sh")
        ),
        "doctor": Part(40, (python, "scripts/doctor.py")),
        "wkv4": Part(60, (*bench("wkv4"), "--quick")),
        "wkv6": Part(45, (*bench("wkv6"), "--quick")),
        "wkv7": Part(90, (*bench("wkv7"), "--quick")),
        "ptx": Part(40, (python, HERE / "ptx.py", ptx or "")),
        "races": Part(60, (*racecheck, python, HERE / "races.py")),
    }
    if ptx is None:
        del found["ptx"]
    return found


def run(name: str, part: Part, out: Path, seconds: float) -> str:
    """Run a part; its output goes to the terminal and to a log. Returns its outcome."""
    limit = min(part.seconds, seconds)
    print(f"=== {name}: at most {limit:.0f} s", flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin = time.monotonic()
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(
                ["timeout", "--kill-after=5", f"{limit:.0f}", *map(str, part.command)],
                cwd=part.cwd,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            return f"did not start: {error}"
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)
        status = process.wait()
    words = {0: "passed", 124: f"stopped after {limit:.0f} s", 137: f"stopped after {limit:.0f} s"}
    return f"{words.get(status, f'exit status {status}')}, {time.monotonic() - begin:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu-report", help="folder of the report")
    parser.add_argument("--seconds", type=float, default=540, help="limit of all parts together")
    parser.add_argument("--ptx", type=Path, help="PTX of the other stack, to check on this GPU")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run; default {','.join(PARTS)}")
    parser.add_argument("--results", action="store_true", help="replace the GPU tables in docs/results.md")
    c = parser.parse_args()
    out = c.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    wanted, begin = c.only.split(","), time.monotonic()
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    for old in (f"{name}.{kind}" for name in PARTS for kind in ("json", "log")):
        (out / old).unlink(missing_ok=True)  # a part that now fails must not show their figures
    conditions, outcomes = tables.conditions(ROOT), {}
    (out / "conditions.json").write_text(json.dumps(conditions), encoding="utf-8")
    print(tables.sentence(conditions), flush=True)
    for name, part in parts(out, c.ptx).items():
        left = c.seconds - RESERVE - (time.monotonic() - begin)
        if name not in wanted:
            outcomes[name] = "not asked for"
        elif left < LEAST:
            outcomes[name] = "not run: no time left"
        else:
            outcomes[name] = run(name, part, out, left)
        if name == "time_mix" and not outcomes[name].startswith(("passed", "not")):
            os.environ["RWKV_FUSED"] = "0"
            outcomes[name] += "; the parts below ran with RWKV_FUSED=0"
        print(f"=== {name}: {outcomes[name]}", flush=True)
    text = tables.report(conditions, outcomes, out)
    (out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    if c.results:
        tables.replace(ROOT / "docs" / "results.md", text)
    if any(not outcome.startswith(("passed", "not asked")) for outcome in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
