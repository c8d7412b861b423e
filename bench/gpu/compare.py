"""Compare the times of two GPU reports, and fail if the later one is slower.

    python bench/gpu/compare.py BEFORE AFTER [--percent 10]

BEFORE and AFTER are folders of `make gpu-report`. A training step is compared by itself; kernels,
which take microseconds and vary more, by the geometric mean over their part of the report. It also
fails if a step that BEFORE measured ends with an error in AFTER; measurements that AFTER lacks
otherwise are listed. Reports of different cards or versions of torch are not compared. Without
BEFORE there is nothing to do, so that the first report passes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

COMPARABLE = ("card", "torch")
KERNELS = ("wkv4", "wkv6", "wkv7")


def times(folder: Path) -> dict[tuple[str, str], float]:
    """Milliseconds by part and measurement."""
    return dict(_times(folder))


def _times(folder: Path) -> Iterator[tuple[tuple[str, str], float]]:
    for row in (_load(folder / "steps.json") or {"rows": []})["rows"]:
        if "error" not in row:
            yield ("steps", row["name"].strip()), row["ahead_ms"]
    for row in _load(folder / "elementwise.json") or []:
        yield ("elementwise", f"{row['shape']}: {row['operation']}"), row["ms"]
    for part in KERNELS:
        for row in (_load(folder / f"{part}.json") or {"results": []})["results"]:
            shape = ", ".join(str(value) for value in row.values() if isinstance(value, (str, int)))
            for way in ("forward", "backward", "chunk_forward", "chunk_backward"):
                if way in row:
                    yield (part, f"{shape}: {way}"), row[way]


def _load(path: Path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def errors(folder: Path) -> dict[str, str]:
    """The errors of training steps, by name."""
    rows = (_load(folder / "steps.json") or {"rows": []})["rows"]
    return {row["name"].strip(): row["error"] for row in rows if "error" in row}


def ratios(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> dict[str, float]:
    """The time after relative to the time before: of each training step, and of each part's kernels
    on average. Measurements that only one report has are left out.
    """
    common = {key: after[key] / before[key] for key in after if key in before}
    found = {f"steps: {name}": ratio for (part, name), ratio in common.items() if part == "steps"}
    for part in ("elementwise", *KERNELS):
        if of_part := [ratio for (name, _), ratio in common.items() if name == part]:
            found[f"{part}: {len(of_part)} kernels, geometric mean"] = statistics.geometric_mean(of_part)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the earlier report")
    parser.add_argument("after", type=Path, help="folder of the later report")
    parser.add_argument("--percent", type=float, default=10, help="fail if a time grew by more than this")
    c = parser.parse_args()
    before, after = (_load(folder / "conditions.json") for folder in (c.before, c.after))
    if after is None:
        parser.error(f"{c.after} has no conditions.json: not the folder of a report")
    if before is None:
        print(f"{c.before} has no report: nothing to compare with")
        return
    if different := [f"{name} {before[name]} and {after[name]}" for name in COMPARABLE if before[name] != after[name]]:
        print(f"not compared: {'; '.join(different)}")
        return
    earlier, later = times(c.before), times(c.after)
    found, missing = ratios(earlier, later), [key for key in earlier if key not in later]
    if not found:
        print("not compared: the reports have no measurement in common")
    else:
        print(f"time at {after['commit']} relative to {before['commit']}, on {after['card']}")
    slower = [name for name, ratio in found.items() if ratio > 1 + c.percent / 100]
    for name, ratio in sorted(found.items(), key=lambda item: -item[1]):
        print(f"{ratio:6.2f}  {name}{'  SLOWER' if name in slower else ''}")
    if missing:
        print("only in the earlier report: " + "; ".join(": ".join(key) for key in missing))
    failed = [f"{name} ({error})" for name, error in errors(c.after).items() if ("steps", name) in earlier]
    problems = [f"more than {c.percent:g} % slower: {'; '.join(slower)}"] if slower else []
    problems += [f"ended with an error: {'; '.join(failed)}"] if failed else []
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
