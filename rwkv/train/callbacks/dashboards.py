"""Log metrics to Weights & Biases and TensorBoard."""

import contextlib
import io
import os
import secrets
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Protocol

from rwkv.config import TrainConfig
from rwkv.train.console import say
from rwkv.train.loop import schedule


class Dashboard(Protocol):
    """A backend for logging metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""

    def sync(self) -> None:
        """Write everything to disk; called before a training state is saved."""

    def close(self) -> None:
        """End logging."""


def make(c: TrainConfig, folder: Path, step: int) -> list[Dashboard]:
    """Create the dashboards selected by the flags, for a run in `folder` that has completed `step`
    steps.
    """
    return ([WandB(c, folder, new=step == schedule.first_step(c))] if c.wandb else []) + (
        [TensorBoard(folder, step)] if c.tensorboard else []
    )


def metrics_of(line: dict[str, Any], weight_decay: float) -> dict[str, float]:
    """Convert a line of metrics.jsonl to metrics with upstream's names, and memory/* for memory;
    values that are None are omitted.
    """
    found = {key: line.get(key) for key in ("loss", "val_loss", "lr", "grad_norm", "targets")}
    found |= {key: value for key, value in line.items() if key.removeprefix("val_").startswith("reward_")}
    found |= {"wd": weight_decay, "Gtokens": line["tokens"] / 1e9, "kt/s": line["tokens_per_s"] / 1e3}
    memory = {key: line[key] for key in line if key.endswith("_mib") and key != "peak_mib"} | line["peak_mib"]
    found |= {f"memory/{name}": value for name, value in memory.items()}
    return {name: value for name, value in found.items() if value is not None}


class WandB:
    """Logs to Weights & Biases: online if there are a key and a connection, else offline to the
    run's folder, with a message.

    The run is named after the folder. Its id is stored there, so that a resumed run continues the
    same W&B run.
    """

    TIMEOUT = 20  # seconds for an answer of the server

    def __init__(self, c: TrainConfig, folder: Path, new: bool):
        import wandb  # takes a second, so imported on use

        with contextlib.redirect_stderr(io.StringIO()):  # hide a note about a default setting
            key, server = wandb.api.api_key, wandb.Settings().base_url
        mode = os.environ.get("WANDB_MODE", "online" if key else "offline")
        reason = "" if key else "no API key: run `wandb login`"
        if mode == "online" and not self._answers(server):
            mode, reason = "offline", f"{server} does not answer"
        run_id = folder / "wandb" / "run-id.txt"
        if new or not run_id.exists():
            run_id.parent.mkdir(exist_ok=True)
            run_id.write_text(secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = {
            "project": c.wandb,
            "dir": str(folder),
            "config": vars(c),
            "name": folder.resolve().name,
        }
        options |= {"id": run_id.read_text(encoding="utf-8").strip(), "mode": mode}
        options["settings"] = wandb.Settings(silent=True, init_timeout=3 * self.TIMEOUT)
        try:
            self._run = wandb.init(**options, resume="allow" if mode == "online" else None)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._run = wandb.init(**options | {"mode": "offline"})
        if self._run.offline:
            sync = shlex.join([sys.executable, "-m", "wandb", "sync", str(Path(self._run.dir).parent)])
            say(f"wandb: offline{' (' + reason + ')' if reason else ''}. Upload the run later with: {sync}")
        else:
            say(f"wandb: {self._run.url}")

    @classmethod
    def _answers(cls, server: str) -> bool:
        """Whether the server answers (through the environment's proxy, if any); wandb itself would
        retry for minutes.
        """
        try:
            with urllib.request.urlopen(server, timeout=cls.TIMEOUT):
                return True
        except urllib.error.HTTPError:
            return True
        except (OSError, ValueError):
            return False

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def sync(self) -> None:
        """Do nothing: wandb writes asynchronously."""

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Writes event files to proj_dir/tensorboard, one per start of the run.

    Uses tensorboardX's synchronous writer: its asynchronous one ignores a full disk, and may lose
    events before a saved training state if the process is killed.
    """

    FOLDER = "tensorboard"
    FLUSH_SECONDS = 10  # interval of flushes

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        (folder / self.FOLDER).mkdir(parents=True, exist_ok=True)
        # the timestamp in the name has seconds only; the number keeps names unique and in order, as
        # TensorBoard sorts them
        self._writer = EventsWriter(str(folder / self.FOLDER / "events"), f".{len(files(folder)):04}")
        # makes TensorBoard drop events of this and later steps from earlier files
        self._writer.write_event(
            Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        )
        self.sync()

    def log(self, step: int, values: dict[str, float]) -> None:
        now = time.time()
        for name, value in values.items():
            self._writer.write_event(self._event(step=step, wall_time=now, summary=self._scalar(name, value)))
        if now - self._synced > self.FLUSH_SECONDS:
            self.sync()

    def sync(self) -> None:
        self._writer.flush()
        self._synced = time.time()

    def close(self) -> None:
        self._writer.close()


def files(folder: Path) -> list[Path]:
    """The event files of the run in this folder."""
    return sorted((folder / TensorBoard.FOLDER).glob("events.out.tfevents.*"))
