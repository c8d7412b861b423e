"""The flags of every program, as typed dataclasses: name, type, default, help text."""

from rwkv.config.conversion import ConvertConfig, InspectConfig
from rwkv.config.methods import FinetuneConfig, LoRAConfig, StateConfig, TrainConfig
from rwkv.config.preference import DPOConfig, FullDPOConfig
from rwkv.config.serving import ServeConfig
from rwkv.config.tools import (
    DoctorConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    FetchConfig,
    GenerateConfig,
    MergeConfig,
)

__all__ = [
    "ConvertConfig",
    "DPOConfig",
    "DoctorConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FetchConfig",
    "FinetuneConfig",
    "FullDPOConfig",
    "GenerateConfig",
    "InspectConfig",
    "LoRAConfig",
    "MergeConfig",
    "ServeConfig",
    "StateConfig",
    "TrainConfig",
]
