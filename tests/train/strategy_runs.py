"""The runs that test_strategies.py compares. All runs of two processes share one pair of processes
(run_trainings.py). DeepSpeed 0.7.0, which trains on GPUs only, uses a fake GPU (cuda_on_cpu.py).
"""

import json
import math
import os
import signal
from pathlib import Path

import torch

from rwkv import checkpoint, compat
from rwkv.config import DPOConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.data.binidx_writer import writer
from rwkv.train.fit import fit
from rwkv.train.runtime import strategy
from tests import preference_pairs
from tests.forked import Process, free_port
from tests.train.run_trainings import copy_after_step
from tests.waiting import LIMIT

STRATEGIES = ["ddp", *(name for name in strategy.ZEROS if name != "deepspeed")]
STEPS = 4
HALF = STEPS // 2  # all runs save a state after it, from which copies of some continue

# Two kinds of runs, as each hides some errors: with clipping a wrong gradient scale has no effect
# (with Adam only through ε), and without clipping a wrong norm has none.
CLIPPED = {"grad_clip": 0.1}
SCALED = {"grad_clip": 0.0, "adam_eps": 1e-2}
LORA = {"grad_clip": 0.1, "lora_dropout": 0.0, "lora_r": 4}
# Parameters that modules use without a layer (mixing weights, low-rank matrices, the norm by head),
# and the value of block 0, which passes through every block. v_in_block_0: parameters that are not
# used.
RWKV7 = {"load_model": "base7.pth", "lr_init": 1e-3}
LORA7 = {**RWKV7, **LORA, "lora_parts": "att,ffn,time,ln"}
# The same for RWKV-6, and for RWKV-5.2, whose decays are the same for every token
RWKV6, RWKV5 = ({"load_model": name, "lr_init": 1e-3} for name in ("base6.pth", "base5.pth"))
LORA6, LORA5 = ({**model, **LORA, "lora_parts": "att,ffn,time,ln"} for model in (RWKV6, RWKV5))
STATE = {**RWKV7, "lr_init": 0.1, "warmup_steps": 0}  # with doc_reset, whose masks differ between ranks
# Target counts differ between ranks and micro-batches, and 3 validation samples leave one rank
# without a last batch.
DOCUMENTS = {"doc_training": 1, "doc_reset": 1, "val_split": 0.2, "val_every": 2, "val_samples": 3, "magic_prime": 0}
# An odd number of validation pairs leaves one rank without a last one.
PAIRS = {"data_file": "pairs_text_document", "magic_prime": 0, "val_split": 0.2, "val_every": 2, "val_samples": 3}
PAIRS |= {"ctx_len": 20}
ONE_PROCESS = {  # one process
    "clipped": ("full", {"micro_bsz": 4, **CLIPPED}),
    "scaled": ("full", {"micro_bsz": 4, **SCALED}),
    "accumulated": ("full", {"micro_bsz": 2, "accumulate_grad_batches": 2, **SCALED}),
    "lora": ("lora", {"micro_bsz": 4, **LORA}),
    "documents": ("full", {"micro_bsz": 4, **CLIPPED, **DOCUMENTS}),
    "RWKV-7": ("full", {"micro_bsz": 4, **SCALED, **RWKV7}),
    "RWKV-7, lora": ("lora", {"micro_bsz": 4, **LORA7}),
    "state": ("state", {"micro_bsz": 4, **STATE}),
    "RWKV-7, nf4": ("lora", {"micro_bsz": 4, "lora_base": "nf4", **LORA7}),
    "pairs": ("dpo", {"micro_bsz": 4, **PAIRS}),
    "pairs, all weights": ("full", {"micro_bsz": 4, "objective": "dpo", "lr_init": 1e-3, **SCALED, **PAIRS}),
    "RWKV-6": ("full", {"micro_bsz": 4, **SCALED, **RWKV6}),
    "RWKV-6, lora": ("lora", {"micro_bsz": 4, **LORA6}),
    "RWKV-5.2": ("full", {"micro_bsz": 4, **SCALED, **RWKV5}),
    "RWKV-5.2, lora": ("lora", {"micro_bsz": 4, **LORA5}),
}
TWO_PROCESSES = {  # two processes: the run of ONE_PROCESS to match, kind, flags
    "full": ("clipped", "full", {"micro_bsz": 2, **CLIPPED}),
    "accumulated": ("scaled", "full", {"micro_bsz": 1, "accumulate_grad_batches": 2, **SCALED}),
    "lora with gradient checkpointing": ("lora", "lora", {"micro_bsz": 2, "grad_cp": 1, **LORA}),
    "documents": ("documents", "full", {"micro_bsz": 1, "accumulate_grad_batches": 2, **CLIPPED, **DOCUMENTS}),
    "chunks": ("clipped", "full", {"micro_bsz": 2, "tbptt_len": 3, "exact": True, **CLIPPED}),
    "gradient checkpointing": ("clipped", "full", {"micro_bsz": 2, "grad_cp": 1, **CLIPPED}),
    "RWKV-7": ("RWKV-7", "full", {"micro_bsz": 2, **SCALED, **RWKV7}),
    "RWKV-7 with gradient checkpointing": ("RWKV-7", "full", {"micro_bsz": 2, "grad_cp": 1, **SCALED, **RWKV7}),
    "RWKV-7, lora": ("RWKV-7, lora", "lora", {"micro_bsz": 2, **LORA7}),
    "RWKV-7, lora with gradient checkpointing": ("RWKV-7, lora", "lora", {"micro_bsz": 2, "grad_cp": 1, **LORA7}),
    "state": ("state", "state", {"micro_bsz": 2, **STATE}),
    "state with gradient checkpointing": ("state", "state", {"micro_bsz": 2, "grad_cp": 1, **STATE}),
    "RWKV-7, nf4": ("RWKV-7, nf4", "lora", {"micro_bsz": 2, "lora_base": "nf4", **LORA7}),
    "pairs": ("pairs", "dpo", {"micro_bsz": 1, "accumulate_grad_batches": 2, **PAIRS}),
    "pairs, all weights": (
        "pairs, all weights",
        "full",
        {"micro_bsz": 2, "objective": "dpo", "lr_init": 1e-3, **SCALED, **PAIRS},
    ),
    "RWKV-6": ("RWKV-6", "full", {"micro_bsz": 2, **SCALED, **RWKV6}),
    "RWKV-6, lora with gradient checkpointing": ("RWKV-6, lora", "lora", {"micro_bsz": 2, "grad_cp": 1, **LORA6}),
    "RWKV-5.2 with gradient checkpointing": ("RWKV-5.2", "full", {"micro_bsz": 2, "grad_cp": 1, **SCALED, **RWKV5}),
    "RWKV-5.2, lora": ("RWKV-5.2, lora", "lora", {"micro_bsz": 2, **LORA5}),
}
MAIN = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"]
STRATEGIES_OF = {
    "full": STRATEGIES,
    "accumulated": STRATEGIES,
    "lora with gradient checkpointing": STRATEGIES,
    "documents": MAIN,
    "chunks": ["ddp", "deepspeed_stage_2"],
    "gradient checkpointing": MAIN,
    "RWKV-7": ["ddp", "deepspeed_stage_1", "deepspeed_stage_3"],
    "RWKV-7 with gradient checkpointing": ["deepspeed_stage_2", "deepspeed_stage_3"],
    "RWKV-7, lora": ["deepspeed_stage_3"],
    "RWKV-7, lora with gradient checkpointing": MAIN,
    "state": ["ddp", "deepspeed_stage_3"],
    "state with gradient checkpointing": ["deepspeed_stage_2", "deepspeed_stage_3"],
    "RWKV-7, nf4": ["ddp"],
    "pairs": ["ddp", "deepspeed_stage_2"],
    "pairs, all weights": ["ddp", "deepspeed_stage_3"],
    # ZeRO-1 and 2 do not depend on the modules: RWKV-7
    "RWKV-6": ["ddp", "deepspeed_stage_3"],
    "RWKV-6, lora with gradient checkpointing": ["deepspeed_stage_3"],
    "RWKV-5.2 with gradient checkpointing": ["deepspeed_stage_3"],
    "RWKV-5.2, lora": ["ddp"],
}
CASES = sorted((name, case) for case, names in STRATEGIES_OF.items() for name in names)
STRATEGY_CHANGES = [  # strategy of the first half, and of the second; "one" is one process
    (before, after)
    for before, after in [
        ("one", "ddp"),
        ("ddp", "one"),
        ("ddp", "deepspeed_stage_2_offload"),
        ("one", "deepspeed_stage_3"),
        ("deepspeed_stage_1", "deepspeed_stage_3"),
        ("deepspeed_stage_2", "deepspeed_stage_2"),
        ("deepspeed_stage_3", "one"),
        ("deepspeed_stage_3_offload", "deepspeed_stage_1_offload"),
    ]
    if {before, after} <= {"one", *STRATEGIES}
]
BAD_GRADIENTS = {  # a gradient of the third step is multiplied
    "nan in fp32, stage 2": ("deepspeed_stage_2", "full", "fp32", math.nan),
    "nan in fp32, stage 3": ("deepspeed_stage_3", "lora", "fp32", math.nan),
    "inf in bf16, stage 1": ("deepspeed_stage_1", "full", "bf16", math.inf),
    "inf in bf16, stage 3 offload": ("deepspeed_stage_3_offload", "full", "bf16", math.inf),
    "inf in fp16, stage 1": ("deepspeed_stage_1", "full", "fp16", math.inf),
    "inf in fp16, stage 2 offload": ("deepspeed_stage_2_offload", "lora", "fp16", math.inf),
    "inf in fp16, stage 3": ("deepspeed_stage_3", "full", "fp16", math.inf),
}
SOLO = {  # DeepSpeed with one process
    "deepspeed_stage_1": ("full", {}),
    "deepspeed_stage_2": ("full", {"ds_config": "all_reduce.json"}),
    "deepspeed_stage_2_offload": ("lora", {}),
    "deepspeed_stage_3": ("full", {"grad_cp": 1, "ds_config": ""}),  # small parameters stay gathered, the default
}
WAITS = [  # with one process; waits for the device are counted
    ("deepspeed_stage_1", "full"),
    ("deepspeed_stage_2", "lora"),
    ("deepspeed_stage_3", "full"),
    ("deepspeed_stage_3", "lora"),
    ("deepspeed_stage_3_offload", "lora"),
]
if compat.stack() == "cu117":  # newer versions read two values of each tensor
    WAITS.append(("deepspeed_stage_2_offload", "full"))
OWN_SEEDS = ["ddp", "deepspeed_stage_2", "deepspeed_stage_3"]  # each rank draws a seed and creates its own weights
BF16 = [
    name for name in ("deepspeed_stage_1", "deepspeed_stage_2_offload", "deepspeed_stage_3") if name in STRATEGIES
]  # in bf16


def run_all(folder: Path, make_model) -> None:
    """Run all trainings, each in a subfolder."""
    checkpoint.save_model(folder / "base.pth", make_model(), {})
    checkpoint.save_model(folder / "base7.pth", make_model(version="7", n_layer=3, v_in_block_0=True), {})
    checkpoint.save_model(folder / "base6.pth", make_model(version="6"), {})
    checkpoint.save_model(folder / "base5.pth", make_model(version="5.2"), {})
    generator = torch.Generator().manual_seed(0)
    with writer(folder / "data") as out:
        for length in torch.randint(3, 20, (40,), generator=generator).tolist():
            out.add([*torch.randint(1, 50, (length,), generator=generator).tolist(), 0])
    # shard every parameter, and release it after the forward pass of its module
    none = dict.fromkeys(("param_persistence_threshold", "max_reuse_distance", "max_live_parameters"), 0)
    stage_3 = {f"stage3_{name}": value for name, value in none.items()}
    (folder / "shard_all.json").write_text(json.dumps({"zero_optimization": {**stage_3, "sub_group_size": 2000}}))

    preference_pairs.write(folder / "pairs_text_document", preference_pairs.random_pairs(40))

    def flags(name: str, case: dict) -> dict:
        return {
            "proj_dir": str(folder / name),
            "ctx_len": 8,
            "epoch_count": 1,
            "epoch_steps": STEPS * case.get("accumulate_grad_batches", 1),
            "random_seed": 1,
            "accelerator": "cpu",
            "magic_prime": -1,
            "lr_init": 1e-2,
            "lr_final": 1e-3,
            "weight_decay": 0.1,
            "precision": "fp32",
            **case,
            "data_file": str(folder / case.get("data_file", "data")),
            "load_model": str(folder / model) if (model := case.get("load_model", "base.pth")) else "",
        }

    def alone(kind: str, flags: dict) -> None:
        fit({"full": TrainConfig, "lora": LoRAConfig, "state": StateConfig, "dpo": DPOConfig}[kind](**flags))

    saving = {"save_every": HALF}
    for name, (kind, case) in ONE_PROCESS.items():
        alone(kind, flags(name, case | saving))
    paired, last_halves = [], []
    for name, case in CASES:
        _, kind, own = TWO_PROCESSES[case]
        paired.append([kind, flags(f"{name}, {case}", {**own, **saving, **process_flags(name, folder)})])
    for kind, own in (("full", CLIPPED), ("lora", LORA)):
        for name in BF16:
            case = {"micro_bsz": 2, "precision": "bf16", **saving, **own, **process_flags(name, folder)}
            paired.append([kind, flags(f"{name}, {kind}, bf16", case)])
            if kind == "full":
                stopped = flags(f"{name}, bf16, stopped", case)
                paired.append([kind, {**stopped, "copy_of": str(folder / f"{name}, {kind}, bf16")}])
    firsts = {"full": ("clipped", "full"), "lora": ("lora", "lora with gradient checkpointing")}
    for kind, own in (("full", CLIPPED), ("lora", LORA)):
        for before, after in STRATEGY_CHANGES:
            name, (one, two) = f"{before}, then {after}, {kind}", firsts[kind]
            copied = {"copy_of": str(folder / (one if before == "one" else f"{before}, {two}"))}
            if after == "one":
                last_halves.append((kind, flags(name, {"micro_bsz": 4, **own, **saving, **copied})))
            else:
                case = {"micro_bsz": 2, **own, **saving, **process_flags(after, folder)}
                paired.append([kind, flags(name, case) | copied])
    for name, (which, kind, precision, value) in BAD_GRADIENTS.items():
        case = {"full": CLIPPED, "lora": LORA}[kind] | {
            "micro_bsz": 2,
            "precision": precision,
            "gradient_factor": [3, value],
        }
        paired.append([kind, flags(name, {**case, **process_flags(which, folder)})])
    new = {"load_model": "", "version": "4", "n_layer": 2, "n_embd": 16, "vocab_size": 50, "random_seed": -1, **CLIPPED}
    paired += [
        ["full", flags(f"{name}, own seeds", {"micro_bsz": 2, **new, **process_flags(name, folder)})]
        for name in OWN_SEEDS
    ]
    solo = []
    for name, (kind, own) in SOLO.items():
        own = {key: value and str(folder / value) if key == "ds_config" else value for key, value in own.items()}
        case = (
            ONE_PROCESS["clipped" if kind == "full" else "lora"][1] | process_flags(name, folder) | {"devices": 1} | own
        )
        solo.append([kind, flags(f"{name}, one process", case)])
    for name, kind in WAITS:
        case = {"micro_bsz": 4, **{"full": CLIPPED, "lora": LORA}[kind], **process_flags(name, folder), "devices": 1}
        counted = {"ds_config": "", "save_every": 2 * STEPS, "count_waits": [1, STEPS - 1]}
        solo.append([kind, flags(f"{name}, {kind}, waits", case | counted)])
    (folder / "all_reduce.json").write_text(json.dumps({"zero_optimization": {"reduce_scatter": False}}))
    (folder / "wrong.json").write_text(json.dumps({"zero_optimization": {"sub_group_size": "many"}}))
    wrong = {"strategy": "deepspeed_stage_3", "ds_config": str(folder / "wrong.json"), "gradient_factor": [0, 1.0]}
    solo.append(["full", flags("invalid", {"micro_bsz": 4, **wrong})])
    run_processes(folder, paired, solo)
    for kind, half in last_halves:
        copy_after_step(HALF, half.pop("copy_of"), half["proj_dir"])
        alone(kind, half)
    for name in OWN_SEEDS:
        seed = json.loads((folder / f"{name}, own seeds/run.json").read_text())["seed"]
        alone("full", flags(f"{name}, seed of rank 0", {"micro_bsz": 4, **new, "random_seed": seed}))


def process_flags(name: str, folder: Path) -> dict:
    """Flags for two processes. By default ZeRO-3 would not shard models as small as these."""
    deepspeed = {"ds_bucket_mb": 1, "ds_config": str(folder / "shard_all.json")} if name in strategy.ZEROS else {}
    return {"devices": 2, "strategy": name, **deepspeed}


def run_processes(folder: Path, paired: list, solo: list) -> None:
    """Run trainings in two processes and, at the same time, others in one (run_trainings.py). Their
    PATH is empty, so that they find no compiler.
    """
    (folder / "nothing").mkdir()
    for name, trainings in (("paired", paired), ("solo", solo)):
        (folder / f"{name}.json").write_text(json.dumps(trainings))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": str(folder / "nothing"), "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}
    program = Path(__file__).with_name("run_trainings.py")
    command = [program, HALF, folder / "paired.json", 2, free_port(), folder / "solo.json", 1, free_port()]
    process = Process(command, folder, environment)
    try:
        result = process.result(4 * LIMIT)  # a minute on an idle machine
    finally:
        process.send_signal(signal.SIGTERM)  # if it has not ended
    printed = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*[01].txt")))
    assert result.returncode == 0, result.stdout + result.stderr + printed
