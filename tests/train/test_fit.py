"""Output files and results of complete runs, and errors before the first step."""

import json
import re
import signal
import time

import pytest
import torch

from rwkv import checkpoint, compat
from rwkv.adapter_files import load_tuned
from rwkv.adapters import lora
from rwkv.checkpoint import load_model, read_manifest, read_tensors
from rwkv.config import LoRAConfig, TrainConfig
from rwkv.data.binidx import Dataset
from rwkv.data.binidx_writer import writer
from rwkv.data.dataset import Contexts
from rwkv.data.token_stream import Stream
from rwkv.errors import UserError
from rwkv.files import sha256
from rwkv.train import setup
from rwkv.train.callbacks import metrics
from rwkv.train.fit import fit
from rwkv.train.resume import state_files
from rwkv.train.run import Run

SMALL = {
    "n_layer": 2,
    "n_embd": 16,
    "vocab_size": 50,
    "ctx_len": 8,
    "micro_bsz": 2,
    "epoch_steps": 4,
    "epoch_count": 3,
    "random_seed": 1,
    "accelerator": "cpu",
    "precision": "fp32",
}
TUNE = {key: value for key, value in SMALL.items() if key not in ("n_layer", "n_embd", "vocab_size")}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_output_files(drawing, make_data, tmp_path):
    data = make_data(200)
    result = fit(TrainConfig(**SMALL, data_file=data, proj_dir=str(tmp_path / "run"), epoch_save=2))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = {"rwkv-0.pth", "rwkv-0.pth.json", "rwkv-2.pth", "rwkv-2.pth.json"}
    assert names == weights | {"metrics.jsonl", "train_log.txt", "loss.png", "run.json", "resume"}
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
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists() or not lines(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(
        r"stopped at step \d+ of 500,000 and saved \(.*rwkv-final.pth\). Run the same command to continue", printed
    )
    # Ctrl-C may arrive between a step and its line
    assert read_manifest(tmp_path / "run/rwkv-final.pth")["step"] - len(lines(tmp_path / "run")) in (0, 1)
    assert load_model(tmp_path / "run/rwkv-final.pth").sizes.n_layer == 2


def test_lora_saves_adapter_only(make_base, make_data, tmp_path):
    base = make_base()
    before = base.read_bytes()
    result = fit(
        LoRAConfig(
            **TUNE, load_model=str(base), data_file=make_data(200), proj_dir=str(tmp_path / "run"), lora_parts="att"
        )
    )
    assert base.read_bytes() == before
    assert all(".att." in key and ".lora_" in key for key in read_tensors(result.checkpoint))
    manifest = read_manifest(result.checkpoint)
    assert (manifest["kind"], manifest["r"], manifest["alpha"], manifest["base"], manifest["base_sha256"]) == (
        "adapter",
        8,
        32,
        "../base.pth",  # relative to the adapter
        sha256(base),
    )
    assert load_tuned(base, result.checkpoint)[0].sizes.n_layer == 2


def test_lora_from_scratch(make_data, tmp_path):
    folder = tmp_path / "run"
    result = fit(
        LoRAConfig(
            **SMALL, data_file=make_data(200), proj_dir=str(folder), lora_parts="att,ffn", lr_init=1e-2, lr_final=1e-2
        )
    )
    base, adapter = read_tensors(folder / "rwkv-base.pth"), read_tensors(result.checkpoint)
    assert read_manifest(result.checkpoint)["base_sha256"] == sha256(folder / "rwkv-base.pth")
    assert not any("lora" in name for name in base)
    # upstream would initialise A, B and the frozen output matrix of most layers to 0: no gradient,
    # ever
    assert all(tensor.any() for name, tensor in adapter.items() if name.endswith("lora_A"))
    moved = [name for name, tensor in adapter.items() if name.endswith("lora_B") and tensor.any()]
    assert len(moved) == sum(name.endswith("lora_B") for name in adapter)
    load_tuned(folder / "rwkv-base.pth", result.checkpoint)


def test_lora_load(make_base, make_data, tmp_path):
    common = {
        **TUNE,
        "load_model": str(make_base()),
        "data_file": make_data(200),
        "lora_dropout": 0.0,
        "magic_prime": -1,
    }
    first = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"), lr_init=1e-2))
    second = fit(
        LoRAConfig(
            **common,
            proj_dir=str(tmp_path / "b"),
            lora_load=str(first.checkpoint),
            lr_init=0.0,
            lr_final=0.0,
            max_steps=1,
        )
    )
    ours, theirs = read_tensors(second.checkpoint), read_tensors(first.checkpoint)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(value.any() for key, value in theirs.items() if key.endswith("lora_B"))


def test_lora_off(make_base, make_data, tmp_path):
    result = fit(
        LoRAConfig(
            **TUNE, lora=False, load_model=str(make_base()), data_file=make_data(200), proj_dir=str(tmp_path / "run")
        )
    )
    assert read_manifest(result.checkpoint)["kind"] == "model"


def test_jsonl_converted(write_jsonl, tmp_path):
    path = write_jsonl(*({"text": f"document number {i}"} for i in range(20)))
    sizes = {"n_layer": 1, "n_embd": 8, "vocab_size": 65536}
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


INVALID_FLAGS = [
    ({"data_file": ""}, "--data_file is missing"),
    ({"data_file": "nothing"}, r"nothing.idx: no such file"),
    ({"ctx_len": 199}, r"has 200 tokens, but one sample of ctx_len 199 needs 201"),
    ({"ctx_len": 0}, "--ctx_len must be at least 1"),
    ({"vocab_size": 49}, r"token id 49 is outside the model's vocabulary of 49"),
    ({"accumulate_grad_batches": 3}, "--epoch_steps 4 must be a multiple of --accumulate_grad_batches 3"),
    ({"epoch_begin": 3}, "nothing to train"),
    ({"magic_prime": 7}, "the largest is 23"),
    ({"strategy": "deepspeed_stage_4"}, "not one of auto, ddp, .*did you mean deepspeed_stage_"),
    ({"n_layer": -1}, "--n_layer must not be negative"),
    ({"beta1": 1.0}, "less than 1"),
    ({"my_pile_shift": -2}, "--my_pile_shift must be at least 0"),
    ({"epoch_begin": 1}, "--epoch_begin 1 continues a run"),
    ({"load_model": "none.pth"}, "none.pth: no such checkpoint"),
    *([] if torch.cuda.is_available() else [({"accelerator": "gpu"}, "torch sees no GPU")]),
]


@pytest.mark.parametrize(("flags", "message"), INVALID_FLAGS)
def test_invalid_flags(make_data, tmp_path, flags, message):
    data = make_data(200)
    with pytest.raises(UserError, match=message):
        fit(TrainConfig(**{**SMALL, "data_file": data, "proj_dir": str(tmp_path / "run"), **flags}))
    assert not (tmp_path / "run").exists()


INVALID_LORA_FLAGS = [
    ({"load_model": ""}, "LoRA needs a pretrained model"),
    ({"lora_parts": "att,emb"}, "LoRA parts are any of"),
    ({"lora_r": 0}, "at least 1"),
    ({"lora_load": "none.pth"}, "none.pth: no such checkpoint"),
    ({"n_embd": 32}, r"--n_embd 32, but it has 16. Sizes come from the checkpoint"),
]


@pytest.mark.parametrize(("flags", "message"), INVALID_LORA_FLAGS)
def test_invalid_lora_flags(make_base, make_data, tmp_path, flags, message):
    base, data = make_base(), make_data(200)
    with pytest.raises(UserError, match=message):
        fit(
            LoRAConfig(
                **{**TUNE, "load_model": str(base), "data_file": data, "proj_dir": str(tmp_path / "run"), **flags}
            )
        )


def test_lora_load_mismatch(make_base, make_data, tmp_path):
    base, data = make_base(), make_data(200)
    common = {**TUNE, "data_file": data, "load_model": str(base)}
    adapter = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a"))).checkpoint
    other = make_base("other.pth", seed=3)
    with pytest.raises(UserError, match="adapter of another base"):
        fit(LoRAConfig(**common | {"load_model": str(other)}, proj_dir=str(tmp_path / "b"), lora_load=str(adapter)))
    with pytest.raises(UserError, match="was trained with alpha 32, but --lora_alpha is 16"):
        fit(LoRAConfig(**common, proj_dir=str(tmp_path / "b"), lora_load=str(adapter), lora_alpha=16))
    with pytest.raises(UserError, match="has rank 8, but --lora_r is 4"):
        fit(LoRAConfig(**common, proj_dir=str(tmp_path / "b"), lora_load=str(adapter), lora_r=4))
    assert not (tmp_path / "b").exists()


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


def test_negative_token_id(tmp_path):
    with writer(tmp_path / "d", "int32") as out:
        out.add([1] * 100)
    raw = bytearray((tmp_path / "d.bin").read_bytes())
    raw[40:44] = b"\xff" * 4
    (tmp_path / "d.bin").write_bytes(raw)
    with pytest.raises(UserError, match="token id -1 is outside the model's vocabulary of 50"):
        fit(TrainConfig(**SMALL, data_file=str(tmp_path / "d"), proj_dir=str(tmp_path / "run")))


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


def test_lora_load_without_matrices(make_base, make_data, tmp_path):
    common = {**TUNE, "load_model": str(make_base()), "data_file": make_data(200), "lora_parts": "time,ln"}
    first = fit(LoRAConfig(**common, proj_dir=str(tmp_path / "a")))
    second = fit(
        LoRAConfig(
            **common,
            proj_dir=str(tmp_path / "b"),
            lora_load=str(first.checkpoint),
            lr_init=0.0,
            lr_final=0.0,
            max_steps=1,
        )
    )
    ours, theirs = read_tensors(second.checkpoint), read_tensors(first.checkpoint)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def poisoned(make_base, tmp_path):
    """Flags with a base whose embedding of token 49 overflows in the first norm, and data with that
    token once.
    """
    tensors = read_tensors(make_base())
    tensors["emb.weight"][49] = 3e38  # finite, as load_model requires; the sum overflows
    torch.save(tensors, tmp_path / "nan.pth")
    with writer(tmp_path / "data") as out:
        out.add([i % 40 for i in range(105)] + [49] + [i % 40 for i in range(94)])
    return {**TUNE, "load_model": str(tmp_path / "nan.pth"), "data_file": str(tmp_path / "data"), "magic_prime": 23}


def test_nan_loss_names_batch(make_base, make_data, tmp_path):
    flags = poisoned(make_base, tmp_path)
    with pytest.raises(UserError) as caught:
        fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), save_every=1))
    printed = re.fullmatch(
        r"step (\d+): the loss is nan, in the batch of samples (\d+) to \d+ \(tokens (\d+) to (\d+), (\d+) to (\d+) of the data\)\. Lower --lr_init, .*"
        r"--on_nan skip; the last valid state is .*/step-(\d+)\.pt; to resume .*",
        str(caught.value),
    )
    step, sample, a, b, c, d, good = map(int, printed.groups())
    assert step > 1
    assert (good, sample) == (step - 1, 2 * (step - 1))
    assert a <= 105 < b or c <= 105 < d
    assert lines(tmp_path / "run")[-1]["loss"] is None


def test_deferred_metrics_match_immediate(make_base, make_data, tmp_path, monkeypatch):
    """On a GPU the metrics of a step are read after the next step is launched; here a CPU does so
    too.
    """
    flags, data = poisoned(make_base, tmp_path), make_data(500)
    read, found, printed = [], [], []
    read_metrics = metrics.Metrics._read

    def recording_read(self, trainer, module, pending):
        read.append(module.step - pending.line["step"])
        read_metrics(self, trainer, module, pending)

    monkeypatch.setattr(metrics.Metrics, "_read", recording_read)
    for late in (False, True):
        monkeypatch.setattr(metrics, "reads_one_step_late", lambda device, late=late: late)
        read.clear()
        fit(TrainConfig(**SMALL | {"epoch_count": 2}, data_file=data, proj_dir=str(tmp_path / f"run{late}")))
        assert set(read) == ({0, 1} if late else {0})
        timed = ("tokens_per_s", "peak_mib", "rss_peak_mib")
        found.append(
            [{key: value for key, value in line.items() if key not in timed} for line in lines(tmp_path / f"run{late}")]
        )
        with pytest.raises(UserError) as caught:
            fit(TrainConfig(**flags, proj_dir=str(tmp_path / f"nan{late}"), save_every=1000))
        printed.append(str(caught.value))
        assert lines(tmp_path / f"nan{late}")[-1]["loss"] is None
        assert not list((tmp_path / f"nan{late}").glob("rwkv-*.pth"))
    assert found[0] == found[1]
    assert printed[0] == printed[1]


def test_on_nan_skip(make_base, tmp_path):
    flags = poisoned(make_base, tmp_path)
    result = fit(TrainConfig(**flags, proj_dir=str(tmp_path / "run"), on_nan="skip"))
    skipped = [line["step"] for line in lines(tmp_path / "run") if line["loss"] is None]
    assert 0 < len(skipped) < result.steps == 12
    weights, before = read_tensors(result.checkpoint), read_tensors(flags["load_model"])
    assert all(value.isfinite().all() for name, value in weights.items() if name != "emb.weight")
    assert not torch.equal(weights["head.weight"], before["head.weight"])
    assert {int(moments["step"]) for moments in state_files.newest(tmp_path / "run").optimizer.values()} == {
        12 - len(skipped)
    }
    tensors = read_tensors(flags["load_model"])
    tensors["ln_out.weight"][:] = 3e38  # every step overflows
    torch.save(tensors, tmp_path / "lost.pth")
    with pytest.raises(UserError, match="step 21: .* 21 consecutive steps"):
        fit(
            TrainConfig(
                **flags | {"load_model": str(tmp_path / "lost.pth"), "epoch_steps": 30},
                proj_dir=str(tmp_path / "b"),
                on_nan="skip",
            )
        )


def test_grad_norm_matches_torch(make_base, make_data, tmp_path):
    base, data = make_base(), make_data(200)
    fit(
        TrainConfig(
            **TUNE | {"max_steps": 1, "grad_clip": 0.01},
            load_model=str(base),
            data_file=data,
            proj_dir=str(tmp_path / "run"),
        )
    )
    model = load_model(base)
    stream = Stream(Dataset(data))
    x, y = zip(*(Contexts(stream, 8, 8, seed=1)[i] for i in range(2)), strict=True)
    logits, _ = model(torch.stack(x))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.stack(y).flatten()).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert lines(tmp_path / "run")[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)  # L2Wrap adds less


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


def test_bf16_base_without_bf16_broadcast(make_base, make_data, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "gloo_supports_bf16", lambda: False)  # as torch 1.13.1, on CPUs
    flags = {
        **TUNE,
        "load_model": str(make_base()),
        "data_file": make_data(200),
        "proj_dir": str(tmp_path / "run"),
        "strategy": "ddp",
    }
    with pytest.raises(UserError, match="--lora_base bf16: ddp on CPUs broadcasts the weights"):
        fit(LoRAConfig(**flags, lora_base="bf16"))
    assert not (tmp_path / "run").exists()
    alone = LoRAConfig(**{**flags, "strategy": "auto"}, lora_base="bf16")
    sizes = setup.sizes_of(alone)
    assert setup.load_or_create(Run(alone, sizes, on_gpu=False)) is not None
    model = setup.load_or_create(Run(LoRAConfig(**flags | {"precision": "bf16"}), sizes, on_gpu=False))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_lora_on_bf16_base_follows_fp32(make_base, make_data, tmp_path, monkeypatch):
    stored, trained = [], []
    store = lora.store_frozen
    monkeypatch.setattr(
        lora, "store_frozen", lambda model, dtype: (store(model, dtype), stored.append(dtype), trained.append(model))[0]
    )
    common = {**TUNE, "load_model": str(make_base()), "data_file": make_data(200), "lora_dropout": 0.0, "lr_init": 1e-2}
    flags = {
        "fp32": {},
        "bf16": {},
        "bf16 on an fp32 base": {"precision": "bf16", "lora_base": "fp32"},
        "fp32 on a bf16 base": {"precision": "fp32", "lora_base": "bf16"},
    }
    for name, given in flags.items():
        fit(LoRAConfig(**common | {"precision": name} | given, proj_dir=str(tmp_path / name)))
    assert stored == [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]
    for dtype, model in zip(stored, trained, strict=True):
        assert model.head.weight.dtype == dtype
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = {name: [line["loss"] for line in lines(tmp_path / name)] for name in flags}
    for name, curve in losses.items():
        assert curve == pytest.approx(losses["fp32"], rel=0.02)  # bf16 keeps 8 significant bits
        assert (curve == losses["fp32"]) == (name == "fp32")
