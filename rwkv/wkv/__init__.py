"""WKV operators, the recurrences of RWKV models. `wkv4` and `wkv7` here are the functions."""

from rwkv.wkv.wkv4 import empty_state, wkv4
from rwkv.wkv.wkv7 import wkv7

__all__ = ["empty_state", "wkv4", "wkv7"]
