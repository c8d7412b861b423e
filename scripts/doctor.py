"""Check this machine for training: what works, what is missing, and how to fix it.

    python scripts/doctor.py
    python scripts/doctor.py --json > report.json      # for a bug report

Exits with status 1 if there is an error. Works without a GPU.
"""

import dataclasses
import json
import sys

from rwkv.cli import parse, report_errors
from rwkv.config import DoctorConfig

MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def main(config: DoctorConfig) -> int:
    from rwkv.doctor import run_checks

    findings = []
    for finding in run_checks(config.folder):
        findings.append(finding)
        if not config.json:
            print(
                f"{MARKS[finding.status]}  {finding.name:15}  {finding.found}"
                + (f"\n{'':23}-> {finding.remedy}" if finding.remedy else ""),
                flush=True,
            )
    failed, warned = (sum(finding.status == status for finding in findings) for status in ("fail", "warn"))
    if config.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        print(f"\n{_count(failed, 'error')}, {_count(warned, 'warning')}")
    return int(failed > 0)


if __name__ == "__main__":
    with report_errors():
        sys.exit(main(parse(DoctorConfig, __doc__)))
