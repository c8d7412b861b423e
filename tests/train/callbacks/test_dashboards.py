"""wandb and TensorBoard show the values of metrics.jsonl, every step once, also after a resume."""

import json
import os
import socket
import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rwkv.config import TrainConfig
from rwkv.errors import UserError
from rwkv.train.callbacks import dashboards
from rwkv.train.fit import fit
from rwkv.train.resume import state_files

FLAGS = {
    "n_layer": 2,
    "version": "4",
    "n_embd": 16,
    "vocab_size": 50,
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 6,
    "epoch_count": 1,
    "random_seed": 1,
}
FLAGS |= {"accelerator": "cpu", "precision": "fp32", "val_split": 0.2, "val_every": 2}


def events(path):
    """The events of a TFRecord file: for each its length (8 bytes), a checksum of it, the event,
    its checksum.
    """
    data, offset = path.read_bytes(), 0
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        for begin, size in ((offset, 8), (offset + 12, length)):
            crc = crc32c(data[begin : begin + size])
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert (masked,) == struct.unpack_from("<I", data, begin + size)
        yield Event.FromString(data[offset + 12 : offset + 12 + length])
        offset += 16 + length


def shown(folder):
    """{name: {step: value}} as TensorBoard shows a folder: a start event removes earlier values of
    later steps.
    """
    found = {}
    for path in sorted(folder.glob("*tfevents*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                found = {
                    name: {step: value for step, value in values.items() if step < event.step}
                    for name, values in found.items()
                }
            for value in event.summary.value:
                values = found.setdefault(value.tag, {})
                assert event.step not in values, f"{value.tag} has step {event.step} twice"
                values[event.step] = value.simple_value
    return found


def test_tensorboard_after_rewind(make_data, tmp_path):
    folder = tmp_path / "run"
    config = {
        **FLAGS,
        "data_file": make_data(200),
        "proj_dir": str(folder),
        "save_every": 2,
        "tensorboard": True,
        "weight_decay": 0.1,
    }
    fit(TrainConfig(**config, max_steps=4))
    state_files.states(folder)[0].unlink()  # as if killed before saving it: steps 3 and 4 are repeated
    assert state_files.newest(folder).step == 2
    fit(TrainConfig(**config))
    lines, found = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        shown(folder / "tensorboard"),
    )
    assert [line["step"] for line in lines] == list(range(1, 7))
    for name in ("loss", "lr", "grad_norm", "val_loss"):
        assert found[name] == pytest.approx(
            {line["step"]: line[name] for line in lines if name in line}, rel=1e-6
        )  # fp32
    assert len(found["val_loss"]) == 3
    assert found["kt/s"] == pytest.approx({line["step"]: line["tokens_per_s"] / 1000 for line in lines})
    assert found["memory/backward"] == {line["step"]: line["peak_mib"]["backward"] for line in lines}
    assert {"memory/rss_peak_mib", "wd", "Gtokens"} < found.keys()
    fit(TrainConfig(**config | {"overwrite": True}, max_steps=1))
    assert shown(folder / "tensorboard")["loss"].keys() == {1}


def test_tensorboard_disk_full(make_data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "flush", full)
    with pytest.raises(UserError, match="tensorboard: no space left on the device; .*continues from its last state"):
        fit(TrainConfig(**FLAGS, data_file=make_data(200), proj_dir=str(tmp_path / "run"), tensorboard=True))


@pytest.fixture
def without_key(monkeypatch, tmp_path):
    """Hide the user's wandb key and environment variables."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_wandb_offline_without_key(make_data, tmp_path, without_key, capfd):
    config = {**FLAGS, "data_file": make_data(200), "proj_dir": str(tmp_path / "a run"), "wandb": "test"}
    fit(TrainConfig(**config, max_steps=2))
    fit(TrainConfig(**config))
    runs = sorted((tmp_path / "a run/wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert len({path.name for path in runs}) == 1  # resuming continues the same wandb run
    printed = capfd.readouterr()
    assert "wandb: offline (no API key: run `wandb login`). Upload the run later with: " in printed.out
    assert f"-m wandb sync '{runs[0].parent}'" in printed.out
    assert "WARNING" not in printed.out + printed.err
    fit(TrainConfig(**config, overwrite=True))
    assert len({path.name for path in (tmp_path / "a run/wandb").glob("offline-run-*/*.wandb")}) == 2


def test_wandb_offline_without_network(make_data, tmp_path, without_key, monkeypatch, capfd):
    with socket.socket() as unused:  # a port without a listener
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        fit(TrainConfig(**FLAGS, data_file=make_data(200), proj_dir=str(tmp_path / "run"), wandb="test"))
    assert "does not answer). Upload the run later with: " in capfd.readouterr().out
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_wandb_unresponsive_server(monkeypatch):
    monkeypatch.setattr(dashboards.WandB, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as unresponsive:
        assert not dashboards.WandB._answers(f"http://127.0.0.1:{unresponsive.getsockname()[1]}")
