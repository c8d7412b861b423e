"""Flags and commands of upstream's and other trainers: accepted, or explained."""

import dataclasses
import inspect
import re

import pytest

from rwkv import arguments
from rwkv.cli import parse
from rwkv.config import (
    ConvertConfig,
    ExportConfig,
    FinetuneConfig,
    LoRAConfig,
    MergeConfig,
    StateConfig,
    TrainConfig,
)
from rwkv.errors import UserError
from rwkv.legacy_flags import IGNORED, NOT_SUPPORTED
from rwkv.train.runtime.lightning import pl


def test_upstream_spellings():
    # as in the upstream READMEs: switches alone, dashes in the converter
    assert parse(LoRAConfig, "", ["--lora", "--lora_r", "4", "--grad_cp", "1"]) == LoRAConfig(
        lora=True, lora_r=4, grad_cp=1
    )
    assert parse(ConvertConfig, "", ["--output-prefix", "x", "--append-eod", "--jsonl-keys=body"]).jsonl_keys == "body"
    assert parse(LoRAConfig, "", ["--lr_init", "1e-4", "--lora=false"]) == LoRAConfig(lr_init=1e-4, lora=False)


def test_unsupported_upstream_flags():
    for spell in (
        lambda name: [f"--{name}", "7"],
        lambda name: [f"--{name}=7"],
        lambda name: [f"--{name.replace('_', '-')}", "7"],
    ):
        with pytest.raises(UserError) as error:  # all are reported
            parse(LoRAConfig, "", [word for name in NOT_SUPPORTED for word in spell(name)])
        lines = str(error.value).splitlines()
        for name, entry in NOT_SUPPORTED.items():
            assert not hasattr(LoRAConfig, name)
            flag = spell(name)[0].removesuffix("=7")
            wanted = f"{flag} 7: .*not supported here; {re.escape(entry.advice[:20])}"
            assert len([line for line in lines if re.search(wanted, line)]) == 1, wanted
    entries = {
        name: entry for name, entry in NOT_SUPPORTED.items() if not hasattr(LoRAConfig, entry.except_with or "-")
    }
    off = [(f"--{name}", value) for name, entry in entries.items() for value in entry.off]
    for argv in ([f"{flag}={value}" for flag, value in off], [word for pair in off for word in pair]):
        assert parse(LoRAConfig, "", ["--n_layer", "3", *argv, "--lora"]).n_layer == 3


def test_upstream_readme_command():
    line = "--load_model x --lora --lora_r 8 --head_qk 0 --pre_ffn 0 --my_pile_stage 0 --n_layer 24 --grad_cp 1 --my_pile_shift -1"
    config = parse(LoRAConfig, "", line.split())
    assert config == LoRAConfig(load_model="x", n_layer=24, grad_cp=1, my_pile_shift=-1)


def test_upstream_converter_command():
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


def test_upstream_defaults():
    # reference: the upstream trainers' own defaults
    upstream = {
        "proj_dir": "out", "random_seed": -1, "ctx_len": 1024, "epoch_steps": 1000, "epoch_count": 500, "epoch_begin": 0, "epoch_save": 5,
        "micro_bsz": 12, "lr_init": 6e-4, "lr_final": 1e-5, "warmup_steps": -1, "beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8, "grad_cp": 0,
        "weight_decay": 0, "weight_decay_final": -1, "layerwise_lr": 1, "magic_prime": 0, "my_pile_shift": 0, "my_pile_edecay": 0,
        "my_exit_tokens": 0, "lora_load": "", "lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.01, "lora_parts": "att,ln,time",
    }  # fmt: skip
    ours = dataclasses.asdict(LoRAConfig()) | dataclasses.asdict(TrainConfig())
    assert LoRAConfig().warmup_steps == 0  # the default of the LoRA fork
    assert {name: ours[name] for name in upstream} == upstream


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--peft bone", "--peft bone: .* only LoRA exists here"),
        ("--quant fp4", "--quant fp4: a flag of RWKV-PEFT .*--lora_base nf4"),
        ("--my_testing x060b", "it selects an experimental version of RWKV-6"),
        ("--my_testing x052a", "it selects an experimental version of RWKV-5"),
        ("--my_testing x051a", "it selects an early version of RWKV-5"),
        ("--my_testing x052-f4", "use --version 5.2 and --dim_ffn with 4 times n_embd"),
        ("--rwkv_version x060b", "it selects an experimental version of RWKV-6"),
        ("--peft none", "tuning all weights is what scripts/finetune.py does"),
        ("--fla_npu", "runs use a CPU or NVIDIA GPUs"),
        ("--ipus 1", "a flag of pytorch-lightning's Trainer that is not supported here; omit it"),
        ("--train_type infctx", "--train_type infctx: .* use --tbptt_len"),
        ("--train_type state", "scripts/state.py, or scripts/finetune.py with --train_type state"),
        ("--train_type fullstate", "of the state, only WKV's is tuned here: use scripts/state.py"),
        ("--loss_mask pad", "padding never contributes to the loss"),
        ("--loss_mask qa", "scripts/convert.py: it writes a loss mask"),
        ("--dataload pad", "use --doc_training 1"),
        ('--lora_config {"lora_r":32}', "pass its entries as flags: --lora_load, --lora_r"),
        ("--train_parts time ln", "--train_parts time ln: .* use --lora_parts"),
        ("--head_size_a 128", "use --head_size for a new model of RWKV-5 to 7"),
        ("--gradient_clip_val 1", "use --grad_clip"),
        ("--per_device_train_batch_size 4", "use --micro_bsz"),
        ("--lora_rank 8", "use --lora_r"),
    ],
)
def test_flags_of_other_trainers(line, answer):
    # https://github.com/Joluck/RWKV-PEFT, https://github.com/BlinkDL/RWKV-LM (RWKV-v5,
    # RWKV-v7/train_temp), https://github.com/Blealtan/RWKV-LM-LoRA
    with pytest.raises(UserError, match=answer) as error:
        parse(LoRAConfig, "", line.split())
    assert len(str(error.value).splitlines()) == 1


def test_no_flag_of_upstreams_trainers_is_unknown():
    """The flags that their parsers define, by default value; `-` stands for a switch."""
    # RWKV-v7/train_temp/train.py, RWKV-v5/train.py, and train.py of Joluck/RWKV-PEFT and
    # JL-er/RWKV-PEFT without those of test_upstream_defaults and of the commands below
    flags = """
        adam_eps=1e-18 train_stage=0 ds_bucket_mb=200 head_size=64 load_partial=0 my_testing=x070 head_chunk=0 kernel=
        train_type= train_type=none train_type=finetune pre_ffn=0 head_qk=0 tiny_att_dim=0 tiny_att_layer=-999 dropout=0
        my_pile_version=1 my_sample_len=0 my_ffn_shift=1 my_att_shift=1 head_size_a=64 head_size_divisor=8 my_pos_emb=0
        my_qa_mask=0 my_random_steps=0 my_testing=x052 my_testing=x060 my_exit=99999999 accelerator=gpu strategy=auto
        devices=1 num_nodes=1 precision=fp16 precision=bf16 accumulate_grad_batches=1
        peft=none l2warp_sparse=0 l2warp_sparse=1 compile=- quant=none dataload=get fla=- loss_mask=none optim=none avg_loss=0
        sft_split=train op=cuda op=triton fused_kernel=- lr_schedule=cos lr_schedule=wsd merge=0 rwkv_version=x070
    """
    argv = []
    for name, value in (flag.split("=") for flag in flags.split()):
        argv += [f"--{name}"] if value == "-" else [f"--{name}", value]
    parse(TrainConfig, "", argv)
    config = parse(FinetuneConfig, "", argv)
    assert (config.train_type, config.precision, config.version, config.adam_eps) == ("none", "bf16", "7", 1e-18)
    for number, name in (("5.2", "x052"), ("6", "x060"), ("7", "x070")):
        assert parse(TrainConfig, "", ["--rwkv_version", name]).version == number
    for name in (
        "peft_config train_parts lora_config pissa_config bone_config disha_config chunk_ctx mask_id data_shuffle sft_field state_tune fla_npu"
    ).split():
        with pytest.raises(UserError, match=f"--{name}: a flag of .*RWKV-PEFT that is not supported here; "):
            parse(TrainConfig, "", [f"--{name}"])


def test_no_flag_of_lightnings_trainer_is_unknown():
    names = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self", "callbacks"}
    assert names <= {*NOT_SUPPORTED, *IGNORED, *TrainConfig.__dataclass_fields__}


def test_state_tuning_has_its_own_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("train_type: states\n")
    for argv in (
        ["--train_type=states"],
        ["--train-type", "state"],
        ["--state_tune", "1"],
        ["--config", str(tmp_path / "c.yaml")],
    ):
        assert arguments.value([*argv, "--no_flag"], FinetuneConfig, "train_type") == "state"
        assert parse(StateConfig, "", argv) == StateConfig()
    assert arguments.value(["--train_type", "none"], FinetuneConfig, "train_type") == "none"
    assert arguments.value([], FinetuneConfig, "train_type") == ""
    assert (StateConfig().lr_init, StateConfig().lr_final, StateConfig().warmup_steps) == (1, 0.01, 10)
    assert FinetuneConfig().adapter is None
    with pytest.raises(UserError, match="--train_type infctx: .* use --tbptt_len"):
        parse(FinetuneConfig, "", ["--train_type", "infctx"])


def test_command_of_train_temp():
    line = "--load_model 0 --wandb x --proj_dir p --my_testing x070 --ctx_len 512 --train_stage 1 --epoch_count 1 --epoch_begin 0"
    line += " --data_file d --my_exit_tokens 1498226207 --magic_prime 2926181 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768"
    line += (
        " --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --data_type binidx"
    )
    line += " --vocab_size 65536 --weight_decay 0.001 --epoch_save 1 --head_size 64 --accelerator cpu --devices 1 --precision bf16"
    line += " --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True --ds_bucket_mb 200 --head_chunk 4096 --kernel @rwkv3"
    config = parse(TrainConfig, "", line.split())
    assert (config.load_model, config.version, config.head_size, config.my_pile_stage) == ("", "7", 64, 1)
    assert (config.my_exit_tokens, config.magic_prime, config.proj_dir) == (1498226207, 2926181, "p")


def test_command_of_rwkv_peft():
    line = (
        "--load_model m.pth --proj_dir p --data_file d --vocab_size 65536 --n_layer 12 --n_embd 768 --data_type binidx"
    )
    line += " --dataload get --loss_mask none --ctx_len 512 --micro_bsz 4 --epoch_steps 10 --epoch_count 1 --epoch_save 1 --lr_init 2e-5"
    line += " --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator cpu --precision bf16 --devices 1"
    line += " --strategy deepspeed_stage_1 --grad_cp 1 --my_testing x070 --peft lora --op fla --fused_kernel --quant none --train_type none"
    config = parse(LoRAConfig, "", line.split())
    assert (config.load_model, config.version, config.lora, config.ctx_len) == ("m.pth", "7", True, 512)
    with pytest.raises(UserError, match="LoRA is what scripts/lora.py trains: use that script"):
        parse(TrainConfig, "", line.split())


def test_flags_of_upstreams_merge_program():
    line = "--base_model b.pth --lora_checkpoint a.pth --lora_init i.pth --type lora"
    with pytest.raises(UserError) as error:
        parse(MergeConfig, "", line.split())
    for words in ("merge.py that is not supported here; use --base\n", "use --adapter\n", "it belongs to PiSSA"):
        assert words in f"{error.value}\n"
    for flag, answer in (
        ("--state_checkpoint s.pth", "use --adapter"),
        ("--peft_checkpoint a.pth", "it belongs to Bone and DiSHA"),
        ("--device cuda", "use --use_gpu to merge on a GPU"),
    ):
        with pytest.raises(UserError, match=f"{flag}: a flag of RWKV-PEFT's merge.py .*{answer}"):
            parse(MergeConfig, "", flag.split())
    with pytest.raises(UserError, match=r"use --base \(in scripts/merge_lora.py\)"):
        parse(LoRAConfig, "", line.split()[:2])
    with pytest.raises(UserError, match="when generating or exporting --dtype fp16$"):
        parse(ExportConfig, "", ["--fp16"])
