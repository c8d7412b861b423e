"""GPU memory by number and by card name."""

import pytest

from rwkv.cards import memory_of_card
from rwkv.errors import UserError


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("", 0), ("24", 24), ("24.5", 24.5), ("0", 0), ("4090", 24), ("RTX 4090", 24), ("rtx-4090", 24), ("RTX4090", 24), ("3080 Ti", 12), ("T4", 16),
        ("NVIDIA GeForce RTX 4090", 24), ("RTX 3070 Laptop GPU", 8), ("A100", 40), ("A100 80GB", 80), ("NVIDIA A100-SXM4-80GB", 80), ("titan rtx", 24),
        ("Tesla V100-SXM2-32GB", 32), ("4060 Ti 16GB", 16), ("NVIDIA H100 80GB HBM3", 80), ("RTX A6000", 48), ("RTX 6000 Ada Generation", 48),
    ],
)  # fmt: skip
def test_card_by_size_or_name(text, memory):
    assert memory_of_card(text) == memory


@pytest.mark.parametrize("text", ["24GB", "24 GB", "9999", "RTX 9999", "-3", "nan", "inf", "big"])
def test_unknown_card(text):
    with pytest.raises(
        UserError,
        match=f'--card: expected a number of GB, such as 24, or a card\'s name, such as "RTX 4090"; got {text}',
    ):
        memory_of_card(text)
