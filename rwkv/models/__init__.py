"""RWKV models: the language model (rwkv.py), and one module per version (v4.py to v7.py)."""

from rwkv.models.rwkv import RWKV
from rwkv.models.state import State
from rwkv.models.version import Sizes

__all__ = ["RWKV", "Sizes", "State"]
