"""RWKV models. RWKV is the model of the only version there is so far, RWKV-4."""

from rwkv.models.v4 import RWKV, BlockState, Sizes

__all__ = ["RWKV", "BlockState", "Sizes"]
