"""The figures of every step on the dashboards that were asked for: Weights & Biases, TensorBoard."""

import time
from pathlib import Path
from typing import Any, Literal, Protocol

from rwkv.config import TrainConfig


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
    return ([WandB(c, folder)] if c.wandb else []) + ([TensorBoard(folder, step)] if c.tensorboard else [])


def figures(line: dict[str, Any], weight_decay: float) -> dict[str, float]:
    """A line of metrics.jsonl under the names of upstream's panels, memory apart; what is no number is left out."""
    found = {key: line.get(key) for key in ("loss", "val_loss", "lr", "grad_norm", "targets")}
    found |= {"wd": weight_decay, "Gtokens": line["tokens"] / 1e9, "kt/s": line["tokens_per_s"] / 1e3}
    memory = {key: line[key] for key in line if key.endswith("_mib") and key != "peak_mib"} | line["peak_mib"]
    found |= {f"memory/{name}": value for name, value in memory.items()}
    return {name: value for name, value in found.items() if value is not None}


class WandB:
    """A run of Weights & Biases: online with a key, else offline in the run's folder."""

    def __init__(self, c: TrainConfig, folder: Path):
        import wandb  # a second to import: only where it is asked for

        mode: Literal["offline"] | None = None if wandb.api.api_key else "offline"
        self._run = wandb.init(project=c.wandb, dir=str(folder), config=vars(c), mode=mode, settings=wandb.Settings(silent=True))

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

    FOLDER, SECONDS = "tensorboard", 10  # SECONDS: between two times that what is written is brought to disk, to be looked at

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        (folder / self.FOLDER).mkdir(parents=True, exist_ok=True)
        # Named by the second; numbered, as two may begin in one, and as TensorBoard reads files in the order of their names.
        self._writer = EventsWriter(str(folder / self.FOLDER / "events"), f".{len(files(folder)):04}")
        # Whatever earlier files say of this step and later ones TensorBoard then drops.
        self._writer.write_event(Event(step=step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
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
