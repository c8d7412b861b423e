"""The flags of every program, as typed dataclasses: name, type, default, help text."""

from rwkv.config.conversion import ConvertConfig, InspectConfig
from rwkv.config.tools import DoctorConfig, EstimateConfig, ExportConfig, FetchConfig, GenerateConfig, MergeConfig
from rwkv.config.training import LoRAConfig, TrainConfig

__all__ = [
    "ConvertConfig",
    "DoctorConfig",
    "EstimateConfig",
    "ExportConfig",
    "FetchConfig",
    "GenerateConfig",
    "InspectConfig",
    "LoRAConfig",
    "MergeConfig",
    "TrainConfig",
]
