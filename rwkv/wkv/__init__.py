"""WKV operators: the recurrences over time of RWKV models. `wkv4` here is the function; its package is rwkv.wkv.wkv4."""

from rwkv.wkv.wkv4 import empty_state, wkv4

__all__ = ["empty_state", "wkv4"]
