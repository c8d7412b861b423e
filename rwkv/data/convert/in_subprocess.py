"""Convert in a subprocess: the training process has threads and must not fork workers, and it would
not return the memory to the system.
"""

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
    """Run rwkv.data.convert.pipeline.convert in a subprocess that ends with this process. Progress
    goes to stderr.

    Returns:
        The lines of the report.

    Raises:
        UserError: as `pipeline.convert`; or the subprocess was killed.
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
            f"was killed by signal {-process.returncode}, probably out of memory"
            if process.returncode < 0
            else "failed with the error above"
        )
        raise UserError(
            f"{config.input}: the conversion {how}; run scripts/convert.py separately, with fewer --workers"
        )
    found = json.loads(answer)
    if "error" in found:
        raise UserError(found["error"])
    return found["report"]


def _main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)  # the parent ended before prctl was called
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
