"""The parallel strategies by name, and what DeepSpeed's ZeRO shards and offloads in each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed shards over the ranks (stage 1: optimizer state; 2: also gradients; 3: also
    parameters), and what it offloads to the CPU."""

    stage: int
    offload_optimizer: bool = False
    offload_weights: bool = False


# Lightning's names, as in upstream's command lines; there stage 1 has no offload.
ZEROS = {
    "deepspeed": Zero(2),
    "deepspeed_stage_1": Zero(1),
    "deepspeed_stage_1_offload": Zero(1, offload_optimizer=True),
    "deepspeed_stage_2": Zero(2),
    "deepspeed_stage_2_offload": Zero(2, offload_optimizer=True),
    "deepspeed_stage_3": Zero(3),
    "deepspeed_stage_3_offload": Zero(3, offload_optimizer=True, offload_weights=True),
}
DDP = ("ddp", "ddp_find_unused_parameters_false")
STRATEGIES = ("auto", *DDP, *ZEROS)
