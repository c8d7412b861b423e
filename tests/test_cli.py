"""The command line out of the dataclasses: upstream's spellings, nearest names, types."""

import dataclasses

import pytest

from rwkv import config as flags
from rwkv.cli import parse, sentences
from rwkv.config import ConvertConfig, LoRAConfig, TrainConfig
from rwkv.errors import UserError
from rwkv.upstream import NOT_SUPPORTED


def refused(argv, capsys, config=LoRAConfig):
    with pytest.raises(SystemExit) as exit_:
        parse(config, "", argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_dataclass():
    assert parse(LoRAConfig, "", []) == LoRAConfig()


def test_upstream_spellings_work():
    # as in the upstream READMEs: switches alone, dashes in the converter
    assert parse(LoRAConfig, "", ["--lora", "--lora_r", "4", "--grad_cp", "1"]) == LoRAConfig(lora=True, lora_r=4, grad_cp=1)
    assert parse(ConvertConfig, "", ["--output-prefix", "x", "--append-eod", "--jsonl-keys=body"]).jsonl_keys == "body"
    assert parse(LoRAConfig, "", ["--lr_init", "1e-4", "--lora=false"]) == LoRAConfig(lr_init=1e-4, lora=False)


def test_an_unknown_flag_names_the_nearest(capsys):
    assert "did you mean --n_layer?" in refused(["--n_layers", "3"], capsys)


def test_upstream_flags_without_a_counterpart_are_refused_with_advice():
    for name, (off, advice) in NOT_SUPPORTED.items():
        assert not hasattr(LoRAConfig, name)
        for argv in ([f"--{name}", "7"], [f"--{name}=7"], [f"--{name.replace('_', '-')}", "7"]):
            with pytest.raises(UserError, match=f"--.* 7: .*not supported here; {advice[:20]}"):
                parse(LoRAConfig, "", argv)
        assert parse(LoRAConfig, "", ["--n_layer", "3", f"--{name}={off}", "--lora"]).n_layer == 3


def test_upstreams_readme_command_is_read_as_meant():
    line = "--load_model x --lora --lora_r 8 --head_qk 0 --pre_ffn 0 --my_pile_stage 0 --n_layer 24 --grad_cp 1 --my_pile_shift -1"
    config = parse(LoRAConfig, "", line.split())
    assert config == LoRAConfig(load_model="x", n_layer=24, grad_cp=1, my_pile_shift=-1)


def test_upstreams_converter_command_is_read_as_meant():
    line = "--input ./sample.jsonl --output-prefix ./data/sample --vocab ./rwkv_vocab_v20230424.txt --dataset-impl mmap"
    line += " --tokenizer-type RWKVTokenizer --append-eod --workers 4 --jsonl-keys text title --num-docs 10 --log-interval=5 --ftfy"
    config = parse(ConvertConfig, "", line.split())
    assert config == ConvertConfig(
        input="./sample.jsonl",
        output_prefix="./data/sample",
        vocab_file="./rwkv_vocab_v20230424.txt",
        workers=4,
        jsonl_keys="text,title",
        ftfy=True,
    )
    with pytest.raises(UserError, match="--dataset-impl lazy: a flag of the upstream programs that is not supported"):
        parse(ConvertConfig, "", ["--dataset-impl", "lazy"])


def test_a_wrong_type_or_choice_is_refused_by_name(capsys):
    assert "n_layer" in refused(["--n_layer", "many"], capsys)
    assert "grad_cp" in refused(["--grad_cp", "2"], capsys)


def test_a_config_file_is_read_and_the_command_line_comes_on_top(tmp_path):
    (tmp_path / "c.yaml").write_text("n_layer: 3\nn_embd: 32\n")
    config = parse(TrainConfig, "", ["--config", str(tmp_path / "c.yaml"), "--n_embd", "64"])
    assert (config.n_layer, config.n_embd) == (3, 64)


@pytest.mark.parametrize("config", [c for c in vars(flags).values() if dataclasses.is_dataclass(c)])
def test_help_explains_every_flag(config, capsys):
    with pytest.raises(SystemExit):
        parse(config, "", ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(config):
        line = text[text.index(f"--{field.name} ") :].split("(type")[0]
        assert len(line.split()) > 3, f"--{field.name} has no explanation"


def test_upstream_defaults_are_kept():
    # reference: the upstream trainers' own defaults
    upstream = {
        "proj_dir": "out", "random_seed": -1, "ctx_len": 1024, "epoch_steps": 1000, "epoch_count": 500, "epoch_begin": 0, "epoch_save": 5,
        "micro_bsz": 12, "lr_init": 6e-4, "lr_final": 1e-5, "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8, "grad_cp": 0,
        "weight_decay": 0, "weight_decay_final": -1, "layerwise_lr": 1, "magic_prime": 0, "my_pile_shift": 0, "my_pile_edecay": 0,
        "my_exit_tokens": 0, "lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01, "lora_parts": "att,ln,time",
    }  # fmt: skip
    ours = dataclasses.asdict(LoRAConfig()) | dataclasses.asdict(TrainConfig())
    assert LoRAConfig().warmup_steps == 0  # the LoRA fork's
    assert {name: ours[name] for name in upstream} == upstream


def test_a_user_error_is_one_line_without_a_traceback():
    with pytest.raises(SystemExit) as exit_, sentences():
        raise UserError("what, where, what to do")
    assert exit_.value.code == "error: what, where, what to do"
