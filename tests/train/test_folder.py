"""A run never silently starts over in a folder with results."""

import json
import shutil

import pytest
import torch

from rwkv.checkpoint import read_manifest, read_tensors
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from rwkv.train.resume.run_state import split
from tests.train.finished_run import changed, content, no_state


@pytest.fixture
def run(finished, tmp_path):
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    return changed(config, proj_dir=str(tmp_path / "run")), tmp_path / "run"


def from_later_version(state):
    content = torch.load(state)
    torch.save({**content, "format": content["format"] + 1}, state)


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
        "a run whose training states were deleted.*--overwrite, which deletes loss.png, metrics.jsonl, report.html, run.json",
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
