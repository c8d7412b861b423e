"""The flags of every program, as typed dataclasses: name, type, default, help text."""

from rwkv.config.conversion import ConvertConfig, InspectConfig
from rwkv.config.serving import ServeConfig
from rwkv.config.tools import DoctorConfig, EstimateConfig, ExportConfig, GenerateConfig, MergeConfig
from rwkv.config.training import LoRAConfig, TrainConfig

__all__ = [
    "ConvertConfig",
    "DoctorConfig",
    "EstimateConfig",
    "ExportConfig",
    "GenerateConfig",
    "InspectConfig",
    "LoRAConfig",
    "MergeConfig",
    "ServeConfig",
    "TrainConfig",
]
