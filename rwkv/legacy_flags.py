"""Flags of other trainers: aliases, and what to use instead of unsupported ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Unsupported:
    """A flag of another program that is not supported here.

    Attributes:
        program: the program it belongs to.
        advice: what to do instead.
        off: values that disable it, with which it is accepted and ignored.
        values: advice by the beginning of the value, instead of `advice`.
        except_with: a flag; `off` does not apply to programs that have it.
    """

    program: str
    advice: str
    off: tuple[str, ...] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    except_with: str = ""

    def message(self, flag: str, value: str) -> str:
        """The error message: which program the flag belongs to, and what to use instead."""
        advice = next((text for begin, text in self.values.items() if value.startswith(begin)), self.advice)
        return f"{flag}{' ' * bool(value)}{value}: a flag of {self.program} that is not supported here; {advice}"


_NEO, _V5, _PEFT = "RWKV-v4neo", "RWKV-v5's trainer and RWKV-PEFT", "RWKV-PEFT"
_TOOL, _LIGHTNING, _HF = "the upstream programs", "pytorch-lightning's Trainer", "Hugging Face trainers"
_STATE = (
    "the initial state is tuned by scripts/state.py, or scripts/finetune.py with --train_type state: use one of them"
)
_VERSIONS = "RWKV-4, RWKV-5.2, RWKV-6 and RWKV-7 can be trained here"
_UPSTREAM = {"x052": "5.2", "x060": "6", "x070": "7"}  # versions by upstream's names


_IMAGES = {
    "my_img_version": "0", "my_img_size": "0", "my_img_bit": "0", "my_img_clip": "x", "my_img_clip_scale": "1", "my_img_l1_scale": "0",
    "my_img_encoder": "x", "my_ffn_shift": "1", "my_att_shift": "1", "my_pos_emb": "0",
}  # fmt: skip
_TESTING = Unsupported(
    "RWKV-LM and RWKV-PEFT",
    f"it selects an experimental model; {_VERSIONS}",
    ("",),
    {
        **{f"{name}-f4": f"use --version {version} and --dim_ffn with 4 times n_embd" for name, version in _UPSTREAM.items()},
        **{f"x052{variant}": f"it selects an experimental version of RWKV-5; {_VERSIONS}" for variant in "abc"},
        "x05": f"it selects an early version of RWKV-5; {_VERSIONS}",
        **{f"x060{variant}": f"it selects an experimental version of RWKV-6; {_VERSIONS}" for variant in "abc"},
    },
)  # fmt: skip
_ADAPTERS = "the only adapters here are LoRA, also as DoRA (--use_dora), and a tuned state (scripts/state.py): omit it"

NOT_SUPPORTED = {
    # BlinkDL/RWKV-LM, RWKV-v4neo, and the same in RWKV-v5
    "my_pile_version": Unsupported(
        _NEO, "it reads a list of datasets: convert them to one, and prime sampling uses it with --magic_prime -1", ("1",)
    ),
    "my_qa_mask": Unsupported(_NEO, "use --chatml_mask 1, or a mask file beside the data: P_text_mask.bin", ("0",)),
    "my_testing": _TESTING,
    "rwkv_version": _TESTING,  # as an older RWKV-PEFT calls it
    "head_qk": Unsupported(_NEO, "omit it: models with a head_q and head_k are not supported", ("0",)),
    "tiny_att_dim": Unsupported(_NEO, "omit it: models with tiny attention are not supported", ("0",)),
    "tiny_att_layer": Unsupported(_NEO, "omit it: models with tiny attention are not supported", ("-999",)),
    "my_sample_len": Unsupported(
        _NEO, "it belongs to --data_type uint16: documents of a binidx and --doc_training 1 do the same", ("0",)
    ),
    **{name: Unsupported(_NEO, "omit it: it belongs to image models", (off,)) for name, off in _IMAGES.items()},
    "cuda_cleanup": Unsupported(_NEO, "omit it: the CUDA cache is never emptied during a run", ("0",)),
    "head_size_a": Unsupported(_V5, "use --head_size for a new model of RWKV-5 to 7; RWKV-4 has no heads", ("64",)),
    "head_size_divisor": Unsupported(_V5, "omit it: it is always 8", ("8",)),
    "train_type": Unsupported(
        _V5,
        "omit it",
        ("", "none", "finetune"),
        {
            "infctx": "it carries the state between the chunks of a long context: use --tbptt_len N",
            "fullstate": "of the state, only WKV's is tuned here: use scripts/state.py, or scripts/finetune.py with --train_type state",
            "state": _STATE,
        },
    ),
    # Joluck/RWKV-PEFT (also JL-er/RWKV-PEFT)
    "peft": Unsupported(
        _PEFT,
        "of its methods only LoRA exists here, also as DoRA (--use_dora): it is what scripts/lora.py trains",
        ("none",),
        {
            "lora": "LoRA is what scripts/lora.py trains: use that script",
            "none": "tuning all weights is what scripts/finetune.py does: use that script",
        },
        except_with="lora",
    ),
    "peft_config": Unsupported(_PEFT, "pass its entries as flags: --lora_r, --lora_alpha, --lora_dropout, --lora_parts"),
    "lora_config": Unsupported(_PEFT, "pass its entries as flags: --lora_load, --lora_r, --lora_alpha, --lora_dropout, --lora_parts"),
    "train_parts": Unsupported(_PEFT, "use --lora_parts, such as --lora_parts att,ffn,time,ln"),
    **{f"{name}_config": Unsupported(_PEFT, _ADAPTERS) for name in ("pissa", "disha", "bone", "miss", "lisa", "state")},
    **{name: Unsupported(_PEFT, _ADAPTERS) for name in ("LISA", "lisa_r", "lisa_k", "PISSA", "svd_niter", "pissa_load", "pissa_init", "bone_load", "bone_r")},
    "state_tune": Unsupported(_PEFT, _STATE, ("0",)),
    "quant": Unsupported(_PEFT, "use --lora_base nf4 or --lora_base int8, which quantise the base model", ("none",)),
    "merge": Unsupported(_PEFT, "omit it: a run saves what it trains, and scripts/merge_lora.py merges an adapter into its base", ("0",)),
    "dataload": Unsupported(
        _PEFT,
        "use --doc_training 1 for whole documents, padded; without it, samples start at random offsets",
        ("get",),
        {"pad": "use --doc_training 1: whole documents, padded", "only": "use --doc_training 1: whole documents, padded"},
    ),
    "loss_mask": Unsupported(
        _PEFT,
        "convert chats with scripts/convert.py: it writes a loss mask, which training uses without a flag",
        ("none",),
        {"pad": "omit it: padding never contributes to the loss"},
    ),
    "mask_id": Unsupported(_PEFT, "convert chats with scripts/convert.py: it writes a loss mask, which training uses without a flag"),
    "data_shuffle": Unsupported(_PEFT, "--doc_training 1 reads documents in random order, --doc_training_seq 1 in the order of the file"),
    "sft_field": Unsupported(_PEFT, "convert the data with scripts/convert.py first"),
    "sft_split": Unsupported(_PEFT, "convert the data with scripts/convert.py first", ("train",)),
    "chunk_ctx": Unsupported(_PEFT, "use --tbptt_len N: tokens in a chunk, the state carried from one to the next"),
    "optim": Unsupported(_PEFT, "use --optimizer adam, adamw8bit, muon or adafactor", ("none",)),
    "avg_loss": Unsupported(_PEFT, "omit it: with --accumulate_grad_batches the loss is always the mean over the whole step", ("0",)),
    "emb": Unsupported("Blealtan's LoRA fork and RWKV-PEFT", "the embedding is not trained by LoRA: omit it, or tune all weights with scripts/finetune.py"),
    "fla_npu": Unsupported(_PEFT, "omit it: runs use a CPU or NVIDIA GPUs"),
    # RWKV-PEFT's merge.py
    "base_model": Unsupported(f"{_PEFT}'s merge.py", "use --base"),
    "lora_checkpoint": Unsupported(f"{_PEFT}'s merge.py", "use --adapter"),
    "state_checkpoint": Unsupported(f"{_PEFT}'s merge.py", "use --adapter"),
    "peft_checkpoint": Unsupported(f"{_PEFT}'s merge.py", "it belongs to Bone and DiSHA, and only LoRA adapters and tuned states can be merged here: use --adapter"),
    "device": Unsupported(f"{_PEFT}'s merge.py", "use --use_gpu to merge on a GPU; training uses a GPU if there is one (--accelerator)", ("cpu",)),
    "lora_init": Unsupported(f"{_PEFT}'s merge.py", "omit it: it belongs to PiSSA, and only LoRA adapters can be merged here", ("none", "")),
    "type": Unsupported(f"{_PEFT}'s merge.py", "omit it: only LoRA adapters can be merged here", ("lora",)),
    # the converter's
    "dataset_impl": Unsupported(_TOOL, "omit it: the memory-mapped format is the only one", ("mmap",)),
    "merge_file": Unsupported(_TOOL, "omit it: neither World nor 20B has one", ("",)),
    # pytorch-lightning's, which upstream's trainers accept
    "gradient_clip_val": Unsupported(_LIGHTNING, "use --grad_clip"),
    "gpus": Unsupported(_LIGHTNING, "use --devices"),
    "num_processes": Unsupported(_LIGHTNING, "use --devices"),
    "max_epochs": Unsupported(_LIGHTNING, "use --epoch_count"),
    "default_root_dir": Unsupported(_LIGHTNING, "use --proj_dir"),
    "val_check_interval": Unsupported(_LIGHTNING, "use --val_split and --val_every"),
    "resume_from_checkpoint": Unsupported(_LIGHTNING, "omit it: the same command continues the run in --proj_dir"),
    "auto_scale_batch_size": Unsupported(_LIGHTNING, "use --auto"),
    **{
        name: Unsupported(_LIGHTNING, "omit it")
        for name in (
            "logger", "enable_checkpointing", "enable_model_summary", "num_sanity_val_steps", "check_val_every_n_epoch", "log_every_n_steps",
            "replace_sampler_ddp", "sync_batchnorm", "benchmark", "deterministic", "detect_anomaly", "profiler", "overfit_batches",
            "limit_train_batches", "limit_val_batches", "fast_dev_run", "min_epochs", "min_steps", "max_time", "plugins", "amp_backend", "amp_level",
            "auto_lr_find", "auto_select_gpus", "track_grad_norm", "ipus", "limit_test_batches", "limit_predict_batches", "move_metrics_to_cpu",
            "multiple_trainloader_mode", "inference_mode", "use_distributed_sampler", "barebones", "model_registry", "enable_autolog_hparams", "reload_dataloaders_every_n_epochs", "gradient_clip_algorithm", "tpu_cores",
        )
    },
    # Hugging Face's Trainer, LLaMA-Factory and the like
    "learning_rate": Unsupported(_HF, "use --lr_init and --lr_final"),
    "lr": Unsupported(_HF, "use --lr_init and --lr_final"),
    "num_train_epochs": Unsupported(_HF, "use --epoch_count, and --epoch_steps for the length of an epoch"),
    "epochs": Unsupported(_HF, "use --epoch_count, and --epoch_steps for the length of an epoch"),
    "per_device_train_batch_size": Unsupported(_HF, "use --micro_bsz"),
    "batch_size": Unsupported(_HF, "use --micro_bsz"),
    "gradient_accumulation_steps": Unsupported(_HF, "use --accumulate_grad_batches"),
    "gradient_checkpointing": Unsupported(_HF, "use --grad_cp 1"),
    "max_grad_norm": Unsupported(_HF, "use --grad_clip"),
    "output_dir": Unsupported(_HF, "use --proj_dir"),
    "model_name_or_path": Unsupported(_HF, "use --load_model"),
    "train_file": Unsupported(_HF, "use --data_file"),
    "dataset": Unsupported(_HF, "use --data_file"),
    "max_seq_length": Unsupported(_HF, "use --ctx_len"),
    "cutoff_len": Unsupported(_HF, "use --ctx_len"),
    "save_steps": Unsupported(_HF, "use --save_every, or --epoch_save for checkpoints"),
    "warmup_ratio": Unsupported(_HF, "use --warmup_steps"),
    "seed": Unsupported(_HF, "use --random_seed"),
    "bf16": Unsupported(_HF, "use --precision bf16; when generating or exporting --dtype bf16"),
    "fp16": Unsupported(_HF, "use --precision fp16; when generating or exporting --dtype fp16"),
    "local_rank": Unsupported(
        "launchers (torch.distributed.launch, deepspeed)", "omit it: --devices N starts N processes, and scripts/launch.sh several machines"
    ),
    "lora_rank": Unsupported(_HF, "use --lora_r"),
    "lora_target": Unsupported(_HF, "use --lora_parts, such as --lora_parts att,ffn,time,ln"),
    "target_modules": Unsupported(_HF, "use --lora_parts, such as --lora_parts att,ffn,time,ln"),
    "deepspeed": Unsupported(_HF, "use --strategy deepspeed_stage_2, and --ds_config for further keys"),
    # inference
    "max_new_tokens": Unsupported(_HF, "use --max_tokens"),
    "max_length": Unsupported(_HF, "use --max_tokens"),
    "top_k": Unsupported("other generators", "use --top_p"),
    "repetition_penalty": Unsupported(_HF, "use --presence_penalty and --frequency_penalty"),
}  # fmt: skip

IGNORED = (
    *("num_docs", "log_interval", "enable_progress_bar"),
    # implementations of the same function: the one for this device is chosen automatically, and
    # the loss never holds all logits in memory (RWKV-v7/train_temp, RWKV-PEFT)
    *("head_chunk", "kernel", "op", "fla", "fused_kernel", "compile", "l2warp_sparse"),
)
"""Flags that are accepted and ignored."""
EQUIVALENT = {
    **{
        (name, value): ("version", version)
        for name in ("my_testing", "rwkv_version")
        for value, version in _UPSTREAM.items()
    },
    ("lr_schedule", "cos"): ("lr_schedule", "cosine"),
    ("peft", "lora"): ("lora", "true"),
    ("state_tune", "1"): ("train_type", "state"),
    ("train_type", "states"): ("train_type", "state"),  # in RWKV-LM's RWKV-v5
    **{("train_type", value): ("train_type", "none") for value in ("", "finetune")},
    ("quant", "nf4"): ("lora_base", "nf4"),
    ("quant", "int8"): ("lora_base", "int8"),
    ("load_model", "0"): ("load_model", ""),  # in the commands of RWKV-v7/train_temp
}
"""Flags with a value, and what they are here; for programs that have this flag."""
ALIASES = {
    "vocab": "vocab_file",
    "train_stage": "my_pile_stage",  # in RWKV-v7/train_temp
    "seq_data": "doc_training_seq",  # as m8than's README calls it
    "seq_data_sep": "doc_sep",
}
LISTS = ("jsonl_keys",)
"""Flags whose value may be several arguments instead of a comma-separated list."""
