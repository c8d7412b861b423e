"""The flags of every program, as typed dataclasses: name, type, default, help text."""

from rwkv.config.conversion import ConvertConfig, InspectConfig
from rwkv.config.tools import DoctorConfig, EstimateConfig, ExportConfig, GenerateConfig, MergeConfig
from rwkv.config.training import FinetuneConfig, LoRAConfig, StateConfig, TrainConfig

__all__ = [
    "ConvertConfig",
    "DoctorConfig",
    "EstimateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "InspectConfig",
    "LoRAConfig",
    "MergeConfig",
    "StateConfig",
    "TrainConfig",
]
