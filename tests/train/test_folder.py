"""A run never silently starts over in a folder with results, and deletes and replaces only files of
this program.
"""

import json
import re
import shutil

import pytest
import torch

from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from rwkv.train.resume.run_state import split

FLAGS = {
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 3,
    "epoch_save": 1,
    "random_seed": 1,
    "accelerator": "cpu",
}
NEW = {"version": "4", "n_layer": 1, "n_embd": 8, "vocab_size": 50}


def changed(config, **flags):
    return type(config)(**{**vars(config), **flags})


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Config and folder of a completed run, to be copied by tests."""
    from rwkv.data.binidx_writer import writer

    folder = tmp_path_factory.mktemp("finished")
    with writer(folder / "data") as out:
        out.add([i * i % 50 for i in range(200)])
    config = TrainConfig(**FLAGS | NEW, data_file=str(folder / "data"), proj_dir=str(folder / "run"))
    fit(config)
    return config, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return changed(config, proj_dir=str(tmp_path / "run")), tmp_path / "run"


def from_later_version(state):
    content = torch.load(state)
    torch.save({**content, "format": content["format"] + 1}, state)


def no_state(run):
    shutil.rmtree(run / "resume")


def corrupt_states(run):
    for state in state_files.states(run):
        state.write_bytes(state.read_bytes()[:5000])


def empty_folder(run):
    no_state(run)
    (run / "resume").mkdir()


def no_checkpoints_either(run):
    no_state(run)
    for path in run.glob("rwkv-*"):
        path.unlink()


def a_file(run):
    no_state(run)
    (run / "resume").touch()


def later_versions(run):
    for state in state_files.states(run):
        from_later_version(state)


def no_manifest(run):
    (run / "run.json").unlink()


def states_alone(run):
    for path in run.iterdir():
        if path.is_file():
            path.unlink()


LOST = [
    (
        no_state,
        r"checkpoints \(rwkv-0.pth, rwkv-1.pth, rwkv-2.pth\) but no training state.*--load_model .*/rwkv-2.pth --epoch_begin 3 --epoch_count 4",
    ),
    (empty_folder, "but no training state.*--epoch_begin 3"),
    (
        corrupt_states,
        r"only corrupt training states \(resume/step-12.pt.corrupt, resume/step-8.pt.corrupt\).*--epoch_begin 3",
    ),
    (
        no_checkpoints_either,
        "a run whose training states were deleted.*--overwrite, which deletes loss.png, metrics.jsonl, run.json",
    ),
    (a_file, "run/resume: must be a folder"),
    (later_versions, "step-12.pt: written by a later version of this program"),
    (no_manifest, r"but no run.json.*--load_model .*/rwkv-2.pth --epoch_begin 3"),
    (states_alone, "but no run.json"),
]


@pytest.mark.parametrize(("lose", "message"), LOST, ids=lambda x: getattr(x, "__name__", ""))
def test_no_silent_restart(lose, message, run):
    config, folder = run
    lose(folder)
    before = content(folder)
    for _ in range(2):  # as a job that restarts on failure
        with pytest.raises(UserError, match=message):
            fit(config)
    assert sorted(content(folder).values()) == sorted(before.values())  # a corrupt state may have been renamed
    if "--epoch_begin 3" in message:  # follow the advice
        weights = read_tensors(folder / "rwkv-2.pth")
        fit(
            changed(
                config,
                n_layer=0,
                n_embd=0,
                vocab_size=0,
                load_model=str(folder / "rwkv-2.pth"),
                epoch_begin=3,
                epoch_count=4,
                lr_init=0,
                lr_final=0,
            )
        )
        assert all(torch.equal(value, weights[name]) for name, value in read_tensors(folder / "rwkv-3.pth").items())
    if "deletes" in message:
        fit(changed(config, overwrite=True, max_steps=1))
        assert read_manifest(folder / "rwkv-final.pth")["step"] == 1


def test_killed_before_first_state(run):
    config, folder = run
    uninterrupted = [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    no_checkpoints_either(folder)
    manifest = json.loads((folder / "run.json").read_text())
    del manifest["state_saved"]
    (folder / "run.json").write_text(json.dumps(manifest))
    metrics_lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(metrics_lines[:7]))
    fit(config)
    assert [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == uninterrupted
    no_checkpoints_either(folder)
    manifest["flags"]["save_every"] = 6  # a state should exist
    (folder / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="metrics of 12 steps but no training state"):
        fit(config)


@pytest.mark.parametrize("due", ["rwkv-2.pth", "rwkv-1.pth"])
def test_missing_checkpoint_rewritten(due, run, capsys):
    config, folder = run
    if due == "rwkv-1.pth":  # killed between the state and the checkpoint of its step
        (folder / "resume/step-12.pt").unlink()
    weights = read_tensors(folder / due)
    for path in (folder / due, folder / f"{due}.json"):
        path.unlink()
    result = fit(config)
    assert f"{folder / due} was missing; written from" in capsys.readouterr().out
    assert result.checkpoint.exists()
    assert all(torch.equal(value, weights[name]) for name, value in read_tensors(folder / due).items())


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def another_file(path):
    torch.save({"emb.weight": torch.zeros(2)}, path)


def without_a_part(path):
    content = torch.load(path)
    text = json.loads(content["text"])
    del text["rng"]
    torch.save({**content, "text": json.dumps(text)}, path)


def wrong_type(path):
    content = torch.load(path)
    torch.save({**content, "text": json.dumps({**json.loads(content["text"]), "weights": {"emb.weight": 3}})}, path)


def no_tensors(path):
    torch.save({**torch.load(path), "tensors": []}, path)


def empty_dictionary(path):
    torch.save({}, path)


def directory_bits(path):
    raw = bytearray(path.read_bytes())
    raw[-30:] = bytes(x ^ 8 for x in raw[-30:])
    path.write_bytes(raw)


DAMAGE = [
    replaced_by_folder,
    empty,
    another_file,
    without_a_part,
    wrong_type,
    no_tensors,
    empty_dictionary,
    directory_bits,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda x: x.__name__)
def test_corrupt_state_falls_back(damage, run, capsys):
    _config, folder = run
    damage(folder / "resume/step-12.pt")
    state = state_files.newest(folder)
    assert state.step == 8
    assert f"{folder}/resume/step-12.pt is corrupt" in capsys.readouterr().out
    assert (folder / "resume/step-12.pt.corrupt").exists()


def test_flipped_bits_in_state(run):
    """A state with a flipped bit is rejected, or read correctly if no reader uses that bit."""
    _, folder = run
    path = folder / "resume/step-12.pt"
    good = path.read_bytes()
    text, tensors = split(vars(state_files.read(path)))
    tensors, rejected = [tensor.clone() for tensor in tensors], 0
    generator = torch.Generator().manual_seed(0)
    places = [
        *torch.randint(len(good), (150,), generator=generator).tolist(),
        *range(len(good) - 40, len(good)),
        *range(40),
    ]
    for place in places:
        raw = bytearray(good)
        raw[place] ^= 1 << place % 8
        path.write_bytes(raw)
        try:
            found_text, found = split(vars(state_files.read(path)))
        except (state_files.CorruptState, UserError):
            rejected += 1
            continue
        assert found_text == text
        assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))
    assert rejected > len(places) / 2


def test_state_of_another_run(run, tmp_path):
    config, folder = run
    fit(changed(config, proj_dir=str(tmp_path / "other"), random_seed=2))
    shutil.copy(tmp_path / "other/resume/step-12.pt", folder / "resume/step-20.pt")
    before = content(folder)
    with pytest.raises(UserError, match="step-12.pt: a training state of another run"):
        fit(config)
    assert content(folder) == before


def test_unreadable_state(run, monkeypatch):
    _, folder = run

    def deny(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(UserError, match="step-12.pt: this training state cannot be read .Permission denied"):
        state_files.newest(folder)
    monkeypatch.undo()
    assert len(state_files.states(folder)) == 2


MANIFESTS = [
    (b"3", "it contains a int"),
    (b"[]", "it contains a list"),
    (b"null", "it contains a NoneType"),
    (b'{"flags": {}}', '"model" is missing'),
    (b"", "not valid JSON"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("raw", "message"), MANIFESTS, ids=lambda x: str(x)[:20])
def test_invalid_manifest(raw, message, run):
    config, folder = run
    (folder / "run.json").write_bytes(raw)
    with pytest.raises(UserError, match=f"run.json: .*{message}.*; choose another --proj_dir, or --overwrite"):
        fit(config)
    fit(changed(config, overwrite=True, max_steps=1))


def test_manifest_with_missing_or_wrong_values(run):
    _config, folder = run
    good = json.loads((folder / "run.json").read_text())
    invalid, rejected = [], 0
    for key in good:
        invalid += [
            {k: v for k, v in good.items() if k != key},
            *({**good, key: value} for value in (None, 3, "x", [], {})),
        ]
        if isinstance(good[key], dict):
            for inner in good[key]:
                invalid.append({**good, key: {k: v for k, v in good[key].items() if k != inner}})
                invalid += [{**good, key: {**good[key], inner: value}} for value in (None, "x", [1], {"a": 1}, -1, 0)]
    from rwkv.train.resume import run_manifest

    for run_json in invalid:
        (folder / "run.json").write_text(json.dumps(run_json))
        try:
            read = run_manifest.read(folder)
        except UserError:
            rejected += 1
            continue
        run_manifest.changes(read, good)
        run_manifest.changes(good, read)
    assert 0 < rejected < len(invalid)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "train_log.txt", "loss.png", "run.json", "rwkv-0.pth", "rwkv-final.pth"]
)
def test_folder_in_place_of_file(name, finished, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=f"{name}: a folder, but the run writes"):
            fit(changed(finished[0], proj_dir=str(tmp_path / "run"), **flags))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.fixture
def upstreams(tmp_path):
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


def test_overwrite_deletes_own_files_only(upstreams, finished, capsys):
    config = changed(finished[0], proj_dir=str(upstreams), load_model="", epoch_count=2)
    before = content(upstreams)
    with pytest.raises(
        UserError,
        match=r"rwkv-38.pth.*--load_model .*out/rwkv-38.pth --epoch_begin 39.*--overwrite, which deletes nothing",
    ):
        fit(config)
    with pytest.raises(
        UserError, match=r"rwkv-final.pth: this run would overwrite it, but it was not written by this program"
    ):
        fit(changed(config, overwrite=True))
    (upstreams / "rwkv-final.pth").unlink()
    with pytest.raises(UserError, match=r"rwkv-0.pth: this run would overwrite it"):
        fit(changed(config, overwrite=True))
    (upstreams / "rwkv-0.pth").unlink()
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
    assert not (upstreams / "rwkv-1.pth").exists()
    after = {str(path): raw for path, raw in content(upstreams).items()}
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


@pytest.mark.parametrize("name", ["loss.png", "vocab.json"])
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


def test_advice_for_lora_run_on_new_base(make_data, tmp_path, monkeypatch):
    """A manifest names the base relative to its own folder; advice is pasted elsewhere."""
    config = LoRAConfig(**FLAGS | NEW, data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, epoch_count=1))
    no_state(tmp_path / "run")
    with pytest.raises(UserError, match=rf"--load_model {tmp_path}/run/rwkv-base.pth --lora_load") as error:
        fit(changed(config, epoch_count=1))
    model, adapter = re.search(r"--load_model (\S+) --lora_load (\S+) --epoch_begin 1", str(error.value)).groups()
    monkeypatch.chdir("/")
    sizes = dict.fromkeys(NEW, 0)
    fit(changed(config, **sizes, load_model=model, lora_load=adapter, epoch_begin=1, epoch_count=2))


def test_advice_for_lora_run_without_state(make_base, make_data, tmp_path):
    base = make_base()
    config = LoRAConfig(**FLAGS, load_model=str(base), data_file=make_data(200), proj_dir=str(tmp_path / "a b"))
    fit(changed(config, epoch_count=1))
    no_state(tmp_path / "a b")
    with pytest.raises(
        UserError, match=rf"--load_model {base} --lora_load '{tmp_path}/a b/rwkv-0.pth' --epoch_begin 1"
    ):
        fit(config)
    fit(changed(config, lora_load=str(tmp_path / "a b/rwkv-0.pth"), epoch_begin=1))


def test_adapter_needs_its_base(make_base, make_data, tmp_path):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    adapter = fit(changed(config, max_steps=1)).checkpoint
    with pytest.raises(UserError, match="the base that it was trained on only; pass that base as --load_model"):
        fit(changed(config, **NEW, load_model="", lora_load=str(adapter), proj_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_lora_load_compared_by_content(make_base, make_data, tmp_path):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    other = fit(changed(config, proj_dir=str(tmp_path / "other"), max_steps=1)).checkpoint
    fit(changed(config, max_steps=1))
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"--lora_load \(SHA-256\): none → [0-9a-f]{64}"):
        fit(changed(config, lora_load=str(other)))
    assert content(tmp_path / "run") == before
    started = changed(config, proj_dir=str(tmp_path / "started"), lora_load=str(other))
    fit(changed(started, max_steps=1))
    shutil.copy(other, tmp_path / "same.pth")
    shutil.copy(f"{other}.json", tmp_path / "same.pth.json")
    fit(changed(started, max_steps=2, lora_load=str(tmp_path / "same.pth")))  # same adapter, another name
    with pytest.raises(UserError, match=r"--lora_load \(SHA-256\): [0-9a-f]{64} → none"):
        fit(changed(started, lora_load=""))


def test_same_parts_in_other_words(make_base, make_data, tmp_path):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=1))
    fit(changed(config, max_steps=2, lora_parts="time, ln,att.value,att.key,att.receptance"))


INCOMPATIBLE = [
    ({"lora_r": 4}, "--lora_r: 8 → 4"),
    ({"lora_parts": "att,ffn,time,ln"}, "--lora_parts: att,ln,time → att,ffn,time,ln"),
    ({"lora_parts": "att"}, "--lora_parts: att,ln,time → att"),
    ({"optimizer": "adafactor"}, "--optimizer: adam → adafactor"),
    ({"lora": False}, "trained: an adapter → all weights"),
]


@pytest.mark.parametrize(("flags", "message"), INCOMPATIBLE, ids=str)
def test_allow_changes_incompatible_state(flags, message, make_base, make_data, tmp_path):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=2))
    before = content(tmp_path / "run")
    with pytest.raises(
        UserError,
        match=rf"(?s)--allow_changes: the training state cannot be used with\n  {message}.*another --proj_dir",
    ):
        fit(changed(config, allow_changes=True, **flags))
    assert content(tmp_path / "run") == before
    fit(changed(config, max_steps=3))  # the original command


def test_manifest_written_after_state_restored(make_base, make_data, tmp_path, monkeypatch):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=2))
    before = content(tmp_path / "run")

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("rwkv.train.runtime.zero.restore", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fit(changed(config, allow_changes=True, lr_init=0.1))
    assert content(tmp_path / "run") == before


def test_fractional_flags_resume(make_base, make_data, tmp_path):
    config = LoRAConfig(
        **FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"), lora_alpha=16.5
    )
    fit(changed(config, max_steps=1, weight_decay=0.01, weight_decay_final=0.001))
    assert fit(changed(config, max_steps=2, weight_decay=0.01, weight_decay_final=0.001)).steps == 2
