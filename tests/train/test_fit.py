"""Output files and results of complete runs."""

import json
import re
import signal

import pytest
import torch

from rwkv import checkpoint
from rwkv.checkpoint import load_model, read_manifest, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.train.fit import fit
from tests.train.small_runs import SMALL, TUNE, lines, wait_for_steps


def test_output_files(drawing, make_data, tmp_path):
    data = make_data(200)
    result = fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(tmp_path / "run"), epoch_save=2))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = {"rwkv-0.pth", "rwkv-0.pth.json", "rwkv-2.pth", "rwkv-2.pth.json"}
    assert names == weights | {"metrics.jsonl", "train_log.txt", "loss.png", "report.html", "run.json", "resume"}
    metrics = lines(tmp_path / "run")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["tokens"] for line in metrics] == [16 * i for i in range(1, 13)]
    assert all(
        line["loss"] > 0 and line["lr"] > 0 and line["tokens_per_s"] > 0 and line["rss_peak_mib"] > 0
        for line in metrics
    )
    assert (result.steps, result.first_loss, result.checkpoint) == (12, metrics[0]["loss"], tmp_path / "run/rwkv-2.pth")
    log = (tmp_path / "run/train_log.txt").read_text()
    assert log.startswith("NEW RUN ")
    assert (
        len(re.findall(r"^\d \d\.\d{6} \d+\.\d{4} 0\.\d{8} \d{4}-\d\d-\d\d .* \d$", log, re.MULTILINE)) == 3
    )  # upstream's format
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    manifest = read_manifest(result.checkpoint)
    assert (manifest["kind"], manifest["step"], manifest["data_sha256"]) == ("model", 12, sha256(f"{data}.bin"))
    assert manifest["flags"]["random_seed"] == 1
    assert load_model(result.checkpoint).sizes.n_layer == 2


def test_partial_epoch_saves_final(make_data, tmp_path):
    result = fit(TrainConfig(**SMALL, data_file=make_data(200), proj_dir=str(tmp_path / "run"), max_steps=6))
    assert result.steps == 6
    assert result.checkpoint.name == "rwkv-final.pth"


def test_same_seed_same_weights(make_data, tmp_path):
    data, weights = make_data(200), []
    for i in range(2):
        weights.append(
            read_tensors(fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(tmp_path / f"{i}"))).checkpoint)
        )
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_epoch_begin_continues_data_and_schedule(make_data, tmp_path):
    data, folder = make_data(200), tmp_path / "run"
    fit(TrainConfig(**SMALL | {"epoch_count": 2, "max_steps": 4}, data_file=data, proj_dir=str(folder), magic_prime=-1))
    fit(
        TrainConfig(
            **TUNE | {"epoch_count": 2},
            data_file=data,
            proj_dir=str(folder),
            magic_prime=-1,
            epoch_begin=1,
            load_model=str(folder / "rwkv-0.pth"),
        )
    )
    uninterrupted = tmp_path / "uninterrupted"
    fit(TrainConfig(**SMALL | {"epoch_count": 2}, data_file=data, proj_dir=str(uninterrupted), magic_prime=-1))
    resumed, expected = lines(folder), lines(uninterrupted)
    assert [line["step"] for line in resumed] == list(range(1, 9))
    assert read_manifest(folder / "rwkv-1.pth")["step"] == 8
    assert [line["lr"] for line in resumed] == [line["lr"] for line in expected]
    # the next batch with the same weights; later steps differ, as Adam's state is lost
    assert resumed[4]["loss"] == pytest.approx(expected[4]["loss"], rel=1e-6)


def test_rewind_drops_later_metrics(make_data, tmp_path):
    data, folder = make_data(200), tmp_path / "run"
    fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(folder), epoch_save=1))
    fit(
        TrainConfig(
            **TUNE,
            data_file=data,
            proj_dir=str(folder),
            epoch_begin=1,
            load_model=str(folder / "rwkv-0.pth"),
            max_steps=2,
        )
    )
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_saves(start, make_base, make_data, tmp_path):
    flags = [
        "--load_model",
        make_base(),
        "--data_file",
        make_data(300),
        "--proj_dir",
        tmp_path / "run",
        "--ctx_len",
        8,
        "--accelerator",
        "cpu",
    ]
    process = start("finetune.py", *flags)
    wait_for_steps(tmp_path / "run", 1, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    assert re.search(
        r"stopped at step \d+ of 500,000 and saved \(.*rwkv-final.pth\). Run the same command to continue", printed
    )
    # Ctrl-C may arrive between a step and its line
    assert read_manifest(tmp_path / "run/rwkv-final.pth")["step"] - len(lines(tmp_path / "run")) in (0, 1)
    assert load_model(tmp_path / "run/rwkv-final.pth").sizes.n_layer == 2


def test_jsonl_converted(write_jsonl, tmp_path):
    path = write_jsonl(*({"text": f"document number {i}"} for i in range(20)))
    sizes = {"version": "4", "n_layer": 1, "n_embd": 8, "vocab_size": 65536}
    result = fit(TrainConfig(**SMALL | sizes | {"max_steps": 2}, data_file=str(path), proj_dir=str(tmp_path / "run")))
    assert read_manifest(result.checkpoint)["tokenizer"] == "World"
    assert (tmp_path / "run/data_text_document.idx").exists()


def test_pre_ffn(make_data, tmp_path):
    result = fit(TrainConfig(**SMALL, pre_ffn=1, data_file=make_data(200), proj_dir=str(tmp_path / "run")))
    assert load_model(result.checkpoint).sizes.pre_ffn


def test_bf16_follows_fp32(make_base, make_data, tmp_path):
    common = {**TUNE, "load_model": str(make_base()), "data_file": make_data(200), "lr_init": 1e-3}
    runs = {p: fit(TrainConfig(**common | {"precision": p}, proj_dir=str(tmp_path / p))) for p in ("fp32", "bf16")}
    losses = {p: [line["loss"] for line in lines(tmp_path / p)] for p in runs}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)  # bf16 keeps 8 significant bits
    assert losses["bf16"] != losses["fp32"]
    assert {value.dtype for value in read_tensors(runs["bf16"].checkpoint).values()} == {torch.float32}


def test_ddp_matches_one_process(script, two_ranks, make_base, make_data, tmp_path):
    base, data = make_base(), make_data(300)
    common = [
        "--load_model",
        base,
        "--data_file",
        data,
        "--ctx_len",
        8,
        "--epoch_steps",
        6,
        "--epoch_count",
        1,
        "--random_seed",
        1,
        "--accelerator",
        "cpu",
    ]
    common += ["--precision", "fp32", "--magic_prime", -1, "--lr_init", 1e-3]
    script("finetune.py", *common, "--micro_bsz", 4, "--proj_dir", "one")
    two_ranks("finetune.py", *common, "--micro_bsz", 2, "--proj_dir", "two")
    one, two = (checkpoint.read_tensors(tmp_path / name / "rwkv-0.pth") for name in ("one", "two"))
    for key in one:
        # fp32 means in different order, then Adam
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5, msg=key)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_finished_run_kept_without_overwrite(make_data, tmp_path, capsys):
    flags = {**SMALL, "data_file": make_data(200), "proj_dir": str(tmp_path / "run"), "max_steps": 2}
    fit(TrainConfig(**flags))
    weights = (tmp_path / "run/rwkv-final.pth").read_bytes()
    assert fit(TrainConfig(**flags)).steps == 2
    assert "already complete (2 steps)" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        fit(TrainConfig(**flags | {"data_file": "nothing"}, overwrite=True))
    assert (tmp_path / "run/rwkv-final.pth").read_bytes() == weights
    assert len(lines(tmp_path / "run")) == 2  # a failed start deletes nothing
    fit(TrainConfig(**flags | {"random_seed": 2}, overwrite=True))
    assert len(lines(tmp_path / "run")) == 2
    assert (tmp_path / "run/rwkv-final.pth").read_bytes() != weights
    with pytest.raises(UserError, match="would delete .*rwkv-final.pth, which this run starts from"):
        fit(TrainConfig(**flags, overwrite=True, load_model=str(tmp_path / "run/rwkv-final.pth")))


def test_overwrite_keeps_foreign_files(make_base, make_data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("rwkv-4-world.pth", "rwkv-init.pth", "rwkv-7.pth", "notes.txt"):
        (folder / name).write_text("mine")
    fit(TrainConfig(**SMALL | {"max_steps": 1}, data_file=make_data(200), proj_dir=str(folder), overwrite=True))
    assert {"rwkv-4-world.pth", "rwkv-init.pth", "rwkv-7.pth", "notes.txt"} <= {path.name for path in folder.iterdir()}


def test_incomplete_metrics_line_dropped(make_data, tmp_path):
    data, folder = make_data(200), tmp_path / "run"
    fit(TrainConfig(**SMALL | {"epoch_count": 1}, data_file=data, proj_dir=str(folder)))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    fit(
        TrainConfig(
            **TUNE | {"epoch_count": 2},
            data_file=data,
            proj_dir=str(folder),
            epoch_begin=1,
            load_model=str(folder / "rwkv-0.pth"),
        )
    )
    assert [line["step"] for line in lines(folder)] == list(range(1, 9))


def test_my_exit(make_data, tmp_path, capsys):
    data = make_data(200)
    assert (
        fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(tmp_path / "a"), my_exit=1)).checkpoint.name
        == "rwkv-1.pth"
    )
    assert "length: 8 steps of 16 tokens (--my_exit 1), epochs 0 to 1." in capsys.readouterr().out
    fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(tmp_path / "b")))
    assert [x["lr"] for x in lines(tmp_path / "a")] == [x["lr"] for x in lines(tmp_path / "b")][:8]


def test_run_manifest_and_dtypes(make_base, make_data, tmp_path, capsys, monkeypatch):
    base, data, secret = make_base(), make_data(200), "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = TUNE | {"load_model": str(base), "data_file": data, "proj_dir": str(tmp_path / "run")}
    fit(LoRAConfig(**flags | {"precision": "bf16"}, wandb="test"))
    printed = capsys.readouterr().out
    assert "precision: bf16, frozen weights stored in bfloat16/float32 (all data types: run.json)" in printed
    assert (
        "One epoch here = 4 steps = 64 tokens (set by --epoch_steps, not by your data; your data is 200 tokens)"
        in printed
    )
    run = json.loads((tmp_path / "run/run.json").read_text())
    types = run["types"]
    assert (
        "bf16: trained weights float32 (they are the master weights), gradients float32, Adam's moments float32, frozen weights"
        in types
    )
    assert "matmuls bfloat16, WKV inputs bfloat16, WKV computation float32" in types
    assert (run["base"]["sha256"], run["data"]["sha256"], run["seed"]) == (sha256(base), sha256(f"{data}.bin"), 1)
    assert re.fullmatch(r"[0-9a-f]{40}\+?", run["git"] or "0" * 40)
    assert run["stack"]["torch"] == torch.__version__.split("+")[0]
    assert len(run["stack"]["lock_sha256"]) == 64
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
