"""A conversion in a process of its own: training's has threads by then, which may not be forked, and keeps the memory that it once took."""

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from rwkv.config import ConvertConfig
from rwkv.errors import UserError

_PROGRAM = "from rwkv.data.convert.in_subprocess import _main; _main()"
_ROOT = str(Path(__file__).parents[3])
_PR_SET_PDEATHSIG = 1


def convert(config: ConvertConfig) -> list[str]:
    """As rwkv.data.convert.pipeline.convert, in another process, which ends with this one. Progress is shown on stderr. Returns the report's lines.

    Raises:
        UserError: as there; or the process was killed.
    """
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            answer, _ = process.communicate(json.dumps(dataclasses.asdict(config)).encode())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        how = (
            f"by signal {-process.returncode}, most likely because memory ran out"
            if process.returncode < 0
            else "by an error, which is above"
        )
        raise UserError(
            f"{config.input}: the conversion was ended {how}; convert it by itself with scripts/convert.py, with fewer --workers"
        )
    found = json.loads(answer)
    if "error" in found:
        raise UserError(found["error"])
    return found["report"]


def _main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)  # it ended before it could be asked for
    from rwkv.data.convert import pipeline

    answer: dict
    try:
        answer = {"report": pipeline.convert(ConvertConfig(**json.load(sys.stdin))).report}
    except UserError as error:
        answer = {"error": str(error)}
    except OSError as error:
        answer = {"error": f"{error.filename}: {error.strerror}" if error.filename else str(error)}
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdout.write(json.dumps(answer))
