"""WKV operators, the recurrences of RWKV models. `wkv4` here is the function, not its package."""

from rwkv.wkv.wkv4 import empty_state, wkv4

__all__ = ["empty_state", "wkv4"]
