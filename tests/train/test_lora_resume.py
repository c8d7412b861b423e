"""Resuming LoRA runs: their base, adapter and parts, and flags that a training state depends on."""

import re
import shutil

import pytest

from rwkv.config import LoRAConfig
from rwkv.errors import UserError
from rwkv.train.fit import fit
from rwkv.train.resume import run_manifest
from tests.train.finished_run import FLAGS, NEW, changed, content, no_state


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
    ({"use_dora": True}, "--use_dora: False → True"),
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


def test_flags_that_an_older_program_lacked(make_base, make_data, tmp_path):
    config = LoRAConfig(**FLAGS, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run"))
    fit(changed(config, max_steps=1))
    run = run_manifest.read(tmp_path / "run")
    for name in ("use_rslora", "lr_schedule", "objective", "optimizer"):
        del run["flags"][name]
    run_manifest.write(tmp_path / "run", run)
    with pytest.raises(UserError, match="--lr_schedule: auto → cosine\n  --use_rslora: False → True\n"):
        fit(changed(config, max_steps=2, use_rslora=True, lr_schedule="cosine"))
    assert fit(changed(config, max_steps=2)).steps == 2


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
