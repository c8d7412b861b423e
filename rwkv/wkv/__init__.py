"""WKV operators, the recurrences of RWKV models. `wkv4`, `wkv6` and `wkv7` are the functions here,
not the packages.
"""

from rwkv.wkv.wkv4 import empty_state, wkv4
from rwkv.wkv.wkv6 import wkv6
from rwkv.wkv.wkv7 import wkv7

__all__ = ["empty_state", "wkv4", "wkv6", "wkv7"]
