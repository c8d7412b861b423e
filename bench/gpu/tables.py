"""The tables of the GPU report, from the JSON files of its parts."""

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from rwkv.files import atomic_write

BEGIN, END = "<!-- gpu-report: begin -->", "<!-- gpu-report: end -->"


def conditions(root: Path) -> dict[str, str]:
    """The card, its driver, the versions and the commit."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = output("git", "describe", "--always", "--dirty")
    versions = {"torch": torch.__version__, "Python": platform.python_version()}
    return {"card": card, "driver": driver, **versions, "commit": commit}


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def load(path: Path) -> Any:
    """The content of a JSON file; None without one, or if its part was stopped while it wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def steps(found: dict[str, Any]) -> str:
    header = ("run", "ms", "host, ms", "tokens/s", "MFU", "peak, GB", "relative to the prediction")
    rows = []
    for row in found["rows"]:
        if "error" in row:
            rows.append((row["name"], row["error"], *[""] * 5))
            continue
        peak, predicted = row["peak_gb"], row["predicted_gb"]
        rows.append(
            (
                row["name"].strip(),
                f"{row['ahead_ms']:.1f}",
                f"{row['host_ms']:.1f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{100 * row['mfu']:.1f} %",
                f"{peak:.2f}",
                f"{100 * peak / predicted:.0f} %",
            )
        )
    speed = f"MFU is relative to a large bf16 matmul, {found['matmul_tflops']:.0f} TFLOP/s."
    kernels = [
        f"\nGPU time of a step of {row['name'].strip()}, ms (launches): "
        + ", ".join(f"{kind} {ms:.2f} ({count})" for kind, (ms, count) in row["kernels"].items())
        + "."
        for row in found["rows"]
        if "kernels" in row
    ]
    return "\n".join([speed, "", table(header, rows), *kernels])


def strategies(found: list[dict[str, Any]]) -> str:
    rows = [
        (row["name"], row["error"], "") if "error" in row else (row["name"], f"{row['difference']:.1e}", row["loss"])
        for row in found
    ]
    return table(("run", "largest relative difference of the loss from plain", "last loss"), rows)


def elementwise(found: list[dict[str, Any]]) -> str:
    rows = [(r["shape"], r["operation"], f"{r['ms']:.4f}", f"{100 * r['share']:.0f} %") for r in found]
    return table(("shape", "operation", "ms", "share of copy speed"), rows)


def wkv4(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{r['B']}, {r['T']}, {r['C']}, {r['dtype']}",
            *(
                cell
                for way in ("forward", "backward")
                for cell in (
                    f"{r[way]:.3f}",
                    f"{100 * r[f'{way}_floor'] / r[way]:.0f} %",
                    f"{r[f'naive_{way}'] / r[way]:.1f}",
                )
            ),
        )
        for r in found["results"]
    ]
    copy = found["copy_bytes_per_ms"] / 1e9
    shares = ("share of copy speed", "naive : ours")
    header = ("B, T, C, dtype", "forward, ms", *shares, "backward, ms", *shares)
    return f"A large copy moves {copy:.2f} TB/s.\n\n" + table(header, rows)


BY_CHUNKS = ("B, T, H, dtype", "forward, ms", "backward, ms", "by chunks: forward, ms", "backward, ms", "token : chunk")


def optional(r: dict[str, Any], name: str, form: str) -> str:
    return format(r[name], form) if name in r else ""


def wkv6(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{r['B']}, {r['T']}, {r['H']}, {r['dtype']}{', constant decay' if r['constant'] else ''}",
            *(f"{r[way]:.3f} ({r[way] / r[f'{way}_floor']:.0f} × floor)" for way in ("forward", "backward")),
            *(optional(r, f"chunk_{way}", ".3f") for way in ("forward", "backward")),
            optional(r, "token : chunk", ".2f"),
        )
        for r in found["results"]
    ]
    return table(BY_CHUNKS, rows)


def wkv7(found: dict[str, Any]) -> str:
    rows = [
        (
            f"{r['B']}, {r['T']}, {r['H']}, {r['dtype']}",
            *(f"{r[way]:.3f} ({r[way] / r[f'{way}_floor']:.0f} × floor)" for way in ("forward", "backward")),
            *(optional(r, f"chunk_{way}", ".3f") for way in ("forward", "backward")),
            *(optional(r, name, ".2f") for name in ("token : chunk", "fla : chunk")),
        )
        for r in found["results"]
    ]
    return table((*BY_CHUNKS, "fla : chunk"), rows)


SECTIONS = {
    "steps": ("Training steps", steps),
    "strategies": ("Strategies and precisions, one process", strategies),
    "elementwise": ("Elementwise kernels", elementwise),
    "wkv4": ("The WKV operator", wkv4),
    "wkv6": ("The WKV operator of RWKV-5 and 6", wkv6),
    "wkv7": ("The WKV operator of RWKV-7", wkv7),
}


def sentence(conditions: dict[str, str]) -> str:
    """The conditions in a line."""
    return ", ".join(value if name == "card" else f"{name} {value}" for name, value in conditions.items())


def report(conditions: dict[str, str], outcomes: dict[str, str], out: Path) -> str:
    """The report as Markdown. `outcomes`: the outcome of each part; `out`: the folder of the JSON
    files.
    """
    lines = [f"{sentence(conditions)}.", "", table(("part", "outcome"), outcomes.items())]
    for name, (title, section) in SECTIONS.items():
        if (found := load(out / f"{name}.json")) is not None and name in outcomes:
            lines += ["", f"### {title}", "", section(found)]
    return "\n".join(lines) + "\n"


def replace(path: Path, text: str) -> None:
    """Replace the text between the markers in a file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no line {BEGIN} followed by {END}")
    with atomic_write(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
