"""Runs of DPO: they learn preferences, resume bit for bit, and need no second model; what is
rejected.
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rwkv import plots
from rwkv.checkpoint import load_model
from rwkv.cli import parse
from rwkv.config import DPOConfig, FinetuneConfig, FullDPOConfig, LoRAConfig, StateConfig
from rwkv.data.binidx import mask_path
from rwkv.errors import UserError
from rwkv.models.version import VERSIONS
from rwkv.train.callbacks import report_page
from rwkv.train.callbacks.reference import NAME
from rwkv.train.fit import fit
from tests import preference_pairs
from tests.train.small_runs import assert_same_tensors, column

RUN = {
    "ctx_len": 24,
    "micro_bsz": 4,
    "epoch_steps": 4,
    "epoch_count": 2,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
    "lr_init": 1e-2,
    "lr_final": 1e-3,
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, image: None)  # drawing takes longer than training


@pytest.fixture
def flags(request, make_base, tmp_path):
    base = make_base(version=getattr(request, "param", "7"), n_embd=32)
    data = preference_pairs.write(tmp_path / "p_text_document", preference_pairs.random_pairs(24))
    return {**RUN, "load_model": str(base), "data_file": data}


@pytest.mark.parametrize("flags", VERSIONS, indirect=True)
def test_learns_preferences(flags, tmp_path, capsys):
    """Chosen and rejected answers have other tokens, so that held-out pairs are ranked too."""
    held = {"val_split": 0.2, "epoch_steps": 15, "dpo_beta": 0.5}
    fit(DPOConfig(**flags | held, proj_dir=str(tmp_path / "run")))
    losses, margins = column(tmp_path / "run"), column(tmp_path / "run", "reward_margin")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the reference is the model itself
    assert margins[0] == pytest.approx(0, abs=1e-3)
    assert losses[-1] < 0.3
    assert margins[-1] > 1.5
    assert column(tmp_path / "run", "reward_accuracy")[-1] == 1
    chosen, rejected = (column(tmp_path / "run", f"reward_{side}") for side in ("chosen", "rejected"))
    assert margins == pytest.approx([a - b for a, b in zip(chosen, rejected, strict=True)], abs=1e-5)
    assert len(column(tmp_path / "run", "val_loss")) == 2
    assert column(tmp_path / "run", "val_reward_accuracy")[-1] == 1
    assert column(tmp_path / "run", "val_reward_margin")[-1] > 1
    assert column(tmp_path / "run", "tokens")[0] == 4 * 2 * 24
    found = capsys.readouterr()
    assert "reference: computing the log-probabilities of " in found.out
    assert "accuracy 1.000, margin" in found.err
    page = (tmp_path / "run/report.html").read_text()
    assert "Reward margin" in page
    assert "nats per pair" in page


def test_reference_is_the_base(flags, tmp_path):
    """The stored values are the base's, also if an adapter or all weights are trained."""
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "lora"), doc_training_seq=1, max_steps=6))
    full = FinetuneConfig(**flags, proj_dir=str(tmp_path / "full"), objective="dpo", doc_training_seq=1, max_steps=6)
    fit(full)
    model = load_model(flags["load_model"]).eval()
    expected = []
    for prompt, *answers in preference_pairs.random_pairs(24):
        for answer in answers:
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                by_token = model(ids[:, :-1])[0].double().log_softmax(-1)
            expected.append(by_token[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(answer) :].sum())
    for run in ("lora", "full"):
        found = load_file(tmp_path / run / NAME)["training"]
        # fp32 against fp64 sums, in batches of other shapes
        torch.testing.assert_close(found.double(), torch.stack(expected).view(-1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", ["4", "7"], indirect=True)
def test_resumed_run_matches_uninterrupted(flags, tmp_path, capsys):
    flags |= {"val_split": 0.2, "val_every": 2, "lora_dropout": 0.1}
    whole = fit(DPOConfig(**flags, proj_dir=str(tmp_path / "whole")))
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "parts"), max_steps=3))
    reference = (tmp_path / "parts" / NAME).read_bytes()
    capsys.readouterr()
    parts = fit(DPOConfig(**flags, proj_dir=str(tmp_path / "parts")))
    # three steps used twelve pairs, the others are added
    added = re.search(r"reference: computing the log-probabilities of (\d+) training pairs", capsys.readouterr().out)
    assert 0 < int(added[1]) < 12
    assert (tmp_path / "parts" / NAME).read_bytes() != reference
    assert (tmp_path / "parts" / NAME).read_bytes() == (tmp_path / "whole" / NAME).read_bytes()
    for name in ("loss", "reward_margin", "grad_norm"):
        assert column(tmp_path / "whole", name) == column(tmp_path / "parts", name)
    for name in ("val_loss", "val_reward_chosen"):  # the second run also has one of step 3, where it stopped
        assert column(tmp_path / "whole", name)[1:] == column(tmp_path / "parts", name)[2:]
    assert_same_tensors(whole.checkpoint, parts.checkpoint)


def test_cache_belongs_to_weights_and_data(flags, tmp_path, capsys):
    first = fit(DPOConfig(**flags, proj_dir=str(tmp_path / "run"), max_steps=6))
    path = tmp_path / "run" / NAME
    stored = path.read_bytes()
    capsys.readouterr()
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "run"), max_steps=7))
    assert "reference:" not in capsys.readouterr().out
    assert path.read_bytes() == stored
    path.write_bytes(b"corrupt")
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "run"), max_steps=8))
    assert "of 24 training pairs" in capsys.readouterr().out
    # computed before the training state is restored: of the base, not of the tuned model
    torch.testing.assert_close(load_file(path)["training"], _loaded(stored, tmp_path)["training"], rtol=1e-5, atol=1e-5)
    # from an adapter: another reference, the model with the adapter
    shutil.copy(first.checkpoint, tmp_path / "adapter.pth")
    shutil.copy(f"{first.checkpoint}.json", tmp_path / "adapter.pth.json")
    other = {**flags, "lora_load": str(tmp_path / "adapter.pth"), "overwrite": True, "max_steps": 1}
    fit(DPOConfig(**other, proj_dir=str(tmp_path / "run")))
    assert column(tmp_path / "run", "reward_margin") == pytest.approx([0], abs=1e-4)
    changed = load_file(path)["training"]
    used = ~changed.isnan()
    assert used.any()
    assert not torch.allclose(changed[used], _loaded(stored, tmp_path)["training"][used], atol=1e-2)


def _loaded(raw, folder):
    (folder / "copy.safetensors").write_bytes(raw)
    return load_file(folder / "copy.safetensors")


def test_accumulation_equals_a_large_batch(flags, tmp_path):
    many = {"micro_bsz": 1, "accumulate_grad_batches": 4, "epoch_steps": 16}
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "one")))
    fit(DPOConfig(**flags | many, proj_dir=str(tmp_path / "many")))
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "recomputed"), grad_cp=1))
    assert column(tmp_path / "recomputed") == column(tmp_path / "one")
    for name in ("loss", "reward_margin", "reward_accuracy", "grad_norm"):
        # fp32 sums in other order, over 8 steps of Adam
        assert column(tmp_path / "many", name) == pytest.approx(column(tmp_path / "one", name), rel=1e-3, abs=1e-4)


def test_initial_state_and_quantised_base(flags, tmp_path):
    state = {"objective": "dpo", "lr_init": 0.5, "lr_final": 0.1, "warmup_steps": 0}
    fit(StateConfig(**flags | state, proj_dir=str(tmp_path / "state")))
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "nf4"), lora_base="nf4", lora_parts="att,ffn"))
    for run in ("state", "nf4"):
        assert column(tmp_path / run, "reward_margin")[0] == pytest.approx(0, abs=1e-3)
        assert column(tmp_path / run)[-1] < column(tmp_path / run)[0]


def test_all_weights_are_trained_at_a_lower_rate(flags, script, tmp_path):
    """dpo.py --lora false; lr_init and lr_final of the command line take precedence."""
    flags = {name: value for name, value in flags.items() if not name.startswith("lr_")}
    words = [f"--{name}={value}" for name, value in flags.items()]
    script("dpo.py", *words, "--lora=false", "--max_steps=2", "--proj_dir=run")
    assert column(tmp_path / "run", "lr")[0] == pytest.approx(1e-6 * 0.1 ** (1 / 8))  # the first of 8 steps to 1e-7
    text = (tmp_path / "run/report.html").read_text()
    assert "--lora false" in text  # the command that repeats the run
    assert "--lr_init" not in text
    config = parse(FullDPOConfig, "", [*words, "--lora=false", "--lr_init=2e-6"])
    assert (config.adapter, config.lr_init, config.lr_final) == (None, 2e-6, 1e-7)
    assert report_page.repeat(config).count("--lr_init 2e-06") == 1


def test_pairs_that_do_not_fit_are_skipped(flags, tmp_path, capsys):
    fit(DPOConfig(**flags | {"ctx_len": 12}, proj_dir=str(tmp_path / "run"), max_steps=1))
    pairs = preference_pairs.random_pairs(24)
    fit_in = sum(len(prompt) + max(map(len, answers)) <= 13 for prompt, *answers in pairs)
    assert 0 < fit_in < 24
    assert f"{24 - fit_in} pairs omitted: too long" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 24 pairs fits --ctx_len 2"):
        fit(DPOConfig(**flags | {"ctx_len": 2}, proj_dir=str(tmp_path / "short")))


def test_other_data_and_flags_are_rejected(flags, make_data, tmp_path):
    def fails(message, config=DPOConfig, **changed):
        with pytest.raises(UserError, match=message):
            fit(config(**flags | changed, proj_dir=str(tmp_path / "rejected")))

    plain = make_data(400)
    fails("data: not preference pairs, which --objective dpo needs", data_file=plain)
    fails("p_text_document: preference pairs, whose rejected answers would be learned", LoRAConfig)
    fails("data: not preference pairs", val_file=plain)
    fails("--tbptt_len 8: the loss of a pair depends on whole answers", tbptt_len=8)
    fails("--magic_prime -1: with --objective dpo a sample is one preference pair", magic_prime=-1)
    fails("--min_ctx_len 8: with --objective dpo", min_ctx_len=8)
    fails("--objective dpo compares answers .* pass it as --load_model", load_model="", n_layer=2, n_embd=32)
    fails("--dpo_beta must be greater than 0; it is 0", dpo_beta=0.0)
    fails("--dpo_label_smoothing must be at least 0 and less than 0.5; it is 0.5", dpo_label_smoothing=0.5)
    fails("--dpo_beta applies to --objective dpo only", LoRAConfig, dpo_beta=1.0, data_file=plain)
    fit(DPOConfig(**flags, proj_dir=str(tmp_path / "run"), max_steps=1))
    with pytest.raises(UserError, match=r"--dpo_beta: 0.1 → 0.2"):
        fit(DPOConfig(**flags, proj_dir=str(tmp_path / "run"), dpo_beta=0.2))
    mask_path(flags["data_file"]).unlink()
    fails("p_text_mask.bin: no such file, but .* says that a loss mask was written")
