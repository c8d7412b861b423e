"""A run deletes and replaces only files of this program."""

import re
import shutil

import pytest

from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from tests.train.finished_run import FLAGS, NEW, changed, content


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "train_log.txt", "loss.png", "report.html", "run.json", "rwkv-0.pth", "rwkv-final.pth"]
)
def test_folder_in_place_of_file(name, finished, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"{name}: a folder, but the run writes"):
            fit(changed(finished[0], proj_dir=str(tmp_path / "run"), **flags))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.fixture
def upstream_folder(tmp_path):
    """A folder as left by upstream's trainer, with a file of the user."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("rwkv-0.pth", "rwkv-35.pth", "rwkv-38.pth", "rwkv-final.pth"):
        (folder / name).write_bytes(b"upstream's")
    (folder / "train_log.txt").write_text(
        "NEW RUN 2023-05-01-10-00-00\n{'load_model': '', 'wandb': '', 'proj_dir': 'out'}\n0 2.1 8.1 0.0001 2023-05-01 0\n"
    )
    (folder / "notes.txt").write_text("mine")
    return folder


def test_overwrite_deletes_own_files_only(upstream_folder, finished, capsys):
    config = changed(finished[0], proj_dir=str(upstream_folder), load_model="", epoch_count=2)
    before = content(upstream_folder)
    with pytest.raises(
        UserError,
        match=r"rwkv-38.pth.*--load_model .*out/rwkv-38.pth --epoch_begin 39.*--overwrite, which deletes nothing",
    ):
        fit(config)
    with pytest.raises(
        UserError, match=r"rwkv-final.pth: this run would overwrite it, but it was not written by this program"
    ):
        fit(changed(config, overwrite=True))
    (upstream_folder / "rwkv-final.pth").unlink()
    with pytest.raises(UserError, match=r"rwkv-0.pth: this run would overwrite it"):
        fit(changed(config, overwrite=True))
    (upstream_folder / "rwkv-0.pth").unlink()
    fit(changed(config, overwrite=True))
    capsys.readouterr()
    fit(changed(config, overwrite=True, epoch_count=1))  # deletes the files of that run
    printed = re.search("deleted: (.*) .of the earlier run", capsys.readouterr().out)[1].split(", ")
    assert {
        "run.json",
        "metrics.jsonl",
        "loss.png",
        "rwkv-0.pth",
        "rwkv-0.pth.json",
        "rwkv-1.pth",
        "rwkv-1.pth.json",
        "resume/step-8.pt",
    } <= set(printed)
    assert not (upstream_folder / "rwkv-1.pth").exists()
    after = {str(path): raw for path, raw in content(upstream_folder).items()}
    assert {"rwkv-35.pth", "rwkv-38.pth", "notes.txt"} <= after.keys()
    for path, raw in before.items():
        if str(path) in ("rwkv-35.pth", "rwkv-38.pth", "notes.txt"):
            assert after[str(path)] == raw
        elif str(path) == "train_log.txt":
            assert after["train_log.txt"].startswith(raw)


def test_overwrite_keeps_validation_data(finished, tmp_path, write_jsonl):
    folder = tmp_path / "run"
    config = changed(finished[0], proj_dir=str(folder), vocab_size=65536, max_steps=1)
    fit(changed(config, data_file=str(write_jsonl(*[{"text": f"document {i}"} for i in range(30)]))))
    copy = {path: raw for path, raw in content(folder).items() if path.name.startswith("data_text_document")}
    assert len(copy) == 4
    fit(changed(config, val_file=str(folder / "data_text_document"), overwrite=True))
    assert {path: content(folder)[path] for path in copy} == copy


@pytest.mark.parametrize("name", ["loss.png", "report.html", "vocab.json"])
def test_other_files_of_user_kept(name, tmp_path):
    (tmp_path / "text.txt").write_text("hello " * 30)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text('{"1": "hello"}')
    text = {"data_type": "utf-8", "data_file": str(tmp_path / "text.txt"), "max_steps": 1, "overwrite": True}
    config = TrainConfig(**FLAGS | NEW | {"vocab_size": 0}, **text, proj_dir=str(folder))
    before = content(folder)
    with pytest.raises(UserError, match=f"{name}: this run would overwrite it, but"):
        fit(config)
    assert content(folder) == before
    (folder / name).unlink()
    fit(config)
    (folder / "metrics.jsonl.corrupt.mine").write_text("mine")
    fit(config)  # may replace the files of a run, and only these
    assert (folder / "metrics.jsonl.corrupt.mine").read_text() == "mine"


def test_empty_folder_name(finished):
    with pytest.raises(UserError, match="--proj_dir is empty"):
        fit(changed(finished[0], proj_dir=""))


def test_base_of_user_kept(make_base, make_data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(make_base(), folder / "rwkv-base.pth")
    config = LoRAConfig(**FLAGS | NEW, data_file=make_data(200), proj_dir=str(folder), overwrite=True)
    before = content(folder)
    with pytest.raises(UserError, match="rwkv-base.pth: this run would overwrite it with a new base"):
        fit(config)
    assert content(folder) == before
    (folder / "rwkv-base.pth").unlink()
    fit(changed(config, max_steps=1))
    fit(changed(config, max_steps=1))  # a base that a run has made may be replaced
