"""GPU memory sizes by card name, for --card."""

import re

from rwkv.errors import UserError

MEMORY = {
    "1060": 6, "1070": 8, "1070ti": 8, "1080": 8, "1080ti": 11, "1650": 4, "1660": 6, "1660super": 6, "1660ti": 6, "2060": 6, "2060super": 8,
    "2070": 8, "2070super": 8, "2080": 8, "2080super": 8, "2080ti": 11, "titanv": 12, "titanxp": 12, "titanrtx": 24, "3050": 8, "3060": 12,
    "3060ti": 8, "3070": 8, "3070ti": 8, "3080": 10, "3080ti": 12, "3090": 24, "3090ti": 24, "4060": 8, "4060ti": 8, "4070": 12, "4070super": 12,
    "4070ti": 12, "4070tisuper": 16, "4080": 16, "4080super": 16, "4090": 24, "4090d": 24, "5060": 8, "5060ti": 8, "5070": 12, "5070ti": 16,
    "5080": 16, "5090": 32, "p4": 8, "p40": 24, "p100": 16, "v100": 16, "t4": 16, "a2": 16, "a10": 24, "a10g": 24, "a16": 16, "a30": 24, "a40": 48,
    "a100": 40, "a800": 40, "a2000": 6, "a4000": 16, "a4500": 20, "a5000": 24, "a5500": 24, "a6000": 48, "2000ada": 16, "4000ada": 20, "4500ada": 24,
    "5000ada": 32, "6000ada": 48, "l4": 24, "l20": 48, "l40": 48, "l40s": 48, "h20": 96, "h100": 80, "h800": 80, "h200": 141, "b200": 180,
    "pro6000": 96,
}  # fmt: skip
"""Advertised GB by name (without vendor and series); for cards sold in several sizes, the
smallest.
"""
_SERIES = re.compile(r"nvidia|geforce|quadro|tesla|rtx|gtx|\b(?:pcie|sxm\d*|nvl|hbm\w*|laptop|mobile|gpu|generation)\b")
_SIZE = re.compile(r"\b(\d+) ?gi?b?\b")
_MAX_GB = 1000  # a larger number, such as 4090, is a name


def memory_of_card(text: str) -> float:
    """Memory of a GPU in GB, from a number or a name such as `RTX 4090`, `4090` or `A100 80GB`; 0
    for an empty string.

    Raises:
        UserError: neither a number of GB nor a known GPU.
    """
    if not text:
        return 0
    try:
        number = float(text)
    except ValueError:
        number = -1
    if 0 <= number <= _MAX_GB:
        return number
    words = re.sub(r"[\W_]+", " ", text.lower())
    name = re.sub(r"\s", "", _SERIES.sub(" ", _SIZE.sub(" ", words)))
    name = "titanrtx" if name == "titan" and "rtx" in words else name
    if name in MEMORY:
        size = _SIZE.search(words)
        return float(size[1]) if size else MEMORY[name]
    raise UserError(f'--card: expected a number of GB, such as 24, or a card\'s name, such as "RTX 4090"; got {text}')
