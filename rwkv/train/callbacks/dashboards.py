"""The figures of every step on the dashboards that were asked for: Weights & Biases, TensorBoard."""

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
    """Somewhere that figures go."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """The figures of an optimizer step."""

    def sync(self) -> None:
        """Bring all of them to disk: a state of the run is about to be saved."""

    def close(self) -> None:
        """The run ends."""


def make(c: TrainConfig, folder: Path, step: int) -> list[Dashboard]:
    """Those that the flags ask for, of a run in `folder` that has made `step` steps."""
    return ([WandB(c, folder, new=step == schedule.first_step(c))] if c.wandb else []) + (
        [TensorBoard(folder, step)] if c.tensorboard else []
    )


def figures(line: dict[str, Any], weight_decay: float) -> dict[str, float]:
    """A line of metrics.jsonl under the names of upstream's panels, memory apart; what is no number is left out."""
    found = {key: line.get(key) for key in ("loss", "val_loss", "lr", "grad_norm", "targets")}
    found |= {"wd": weight_decay, "Gtokens": line["tokens"] / 1e9, "kt/s": line["tokens_per_s"] / 1e3}
    memory = {key: line[key] for key in line if key.endswith("_mib") and key != "peak_mib"} | line["peak_mib"]
    found |= {f"memory/{name}": value for name, value in memory.items()}
    return {name: value for name, value in found.items() if value is not None}


class WandB:
    """A run of Weights & Biases: online with a key and a network, else offline in the run's folder, which is then said.

    It bears the name of the folder, and keeps its id there, so that a run that is resumed is the same one.
    """

    SECONDS = 20  # that the server may take to answer

    def __init__(self, c: TrainConfig, folder: Path, new: bool):
        import wandb  # a second to import: only where it is asked for

        with contextlib.redirect_stderr(io.StringIO()):  # a remark on a setting that nobody has set
            key, server = wandb.api.api_key, wandb.Settings().base_url
        chosen = os.environ.get("WANDB_MODE", "online" if key else "offline")  # the user's, in any case
        reason = "" if key else "there is no key: run `wandb login`"
        if chosen == "online" and not self._answers(server):
            chosen, reason = "offline", f"{server} does not answer"
        place = folder / "wandb" / "run-id.txt"
        if new or not place.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_text(secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = {
            "project": c.wandb,
            "dir": str(folder),
            "config": vars(c),
            "name": folder.resolve().name,
        }
        options |= {"id": place.read_text(encoding="utf-8").strip(), "mode": chosen}
        options["settings"] = wandb.Settings(silent=True, init_timeout=3 * self.SECONDS)
        try:
            self._run = wandb.init(**options, resume="allow" if chosen == "online" else None)
        except wandb.errors.Error as error:
            if chosen != "online":
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
        """Whether there is a server, through a proxy if the environment names one; wandb itself would try for minutes."""
        try:
            with urllib.request.urlopen(server, timeout=cls.SECONDS):
                return True
        except urllib.error.HTTPError:
            return True
        except (OSError, ValueError):
            return False

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def sync(self) -> None:
        """wandb writes as it likes."""

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in proj_dir/tensorboard, one for each time that the run was started.

    By tensorboardX's writer, and not the thread that it offers around it: that one dies of a full disk unheard, and kill -9 loses what it has
    not written when a state is saved.
    """

    FOLDER, SECONDS = (
        "tensorboard",
        10,
    )  # SECONDS: between two times that what is written is brought to disk, to be looked at

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        (folder / self.FOLDER).mkdir(parents=True, exist_ok=True)
        # Named by the second; numbered, as two may begin in one, and as TensorBoard reads files in the order of their names.
        self._writer = EventsWriter(str(folder / self.FOLDER / "events"), f".{len(files(folder)):04}")
        # Whatever earlier files say of this step and later ones TensorBoard then drops.
        self._writer.write_event(
            Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        )
        self.sync()

    def log(self, step: int, figures: dict[str, float]) -> None:
        now = time.time()
        for name, value in figures.items():
            self._writer.write_event(self._event(step=step, wall_time=now, summary=self._scalar(name, value)))
        if now - self._synced > self.SECONDS:
            self.sync()

    def sync(self) -> None:
        self._writer.flush()
        self._synced = time.time()

    def close(self) -> None:
        self._writer.close()


def files(folder: Path) -> list[Path]:
    """The event files of the run in this folder."""
    return sorted((folder / TensorBoard.FOLDER).glob("events.out.tfevents.*"))
