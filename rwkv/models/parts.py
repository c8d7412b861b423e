"""Names for what an adapter can train: groups of linear layers, single layers, and fully trained
tensors.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

ALL = "all-linear"
"""The part with all linear layers of the blocks."""
_LAYER = re.compile(r"^(.*\.)?(att|ffn)(Pre)?\.(\w+)$")


def layer_of(name: str) -> str:
    """The layer name of a module within its block: att.key for blocks.3.att.key, ffn.key for
    blocks.0.ffnPre.key.
    """
    return _LAYER.sub(r"\2.\4", name)


@dataclass(frozen=True)
class Parts:
    """The possible parts of an adapter for one version. Each single layer is a part, too.

    Attributes:
        groups: linear layers that get adapters, by part name.
        single: layers that are in no group.
        full: regular expressions for names of fully trained tensors, by part name.
        low_rank: regular expression for names of low-rank matrices that are used in matmuls only;
            while frozen, they are stored in the dtype of linear layers (RWKV-6's are also used in
            fp32). Empty: none.
    """

    groups: Mapping[str, tuple[str, ...]]
    single: tuple[str, ...]
    full: Mapping[str, str]
    low_rank: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers of a block that can have an adapter."""
        return tuple(dict.fromkeys([layer for group in self.groups.values() for layer in group] + [*self.single]))

    @property
    def names(self) -> tuple[str, ...]:
        """All names of parts."""
        return (*self.groups, ALL, *self.full, *self.layers)

    def layers_of(self, part: str) -> tuple[str, ...]:
        """The layers of a block that get adapters for a part; none for fully trained tensors."""
        if part == ALL:
            return self.layers
        return () if part in self.full else self.groups.get(part, (part,))

    def fully_trained(self, name: str, parts: Collection[str]) -> bool:
        """Whether the parts fully train the parameter of this name."""
        return any(re.search(self.full[part], name) for part in parts if part in self.full)

    def is_low_rank(self, name: str) -> bool:
        """Whether a parameter is one of the low-rank matrices."""
        return bool(self.low_rank) and re.search(self.low_rank, name) is not None

    def normal(self, parts: Collection[str]) -> list[str]:
        """The parts in normal form: complete groups, single layers in order, then fully trained
        tensors.
        """
        layers = {layer for part in parts for layer in self.layers_of(part)}
        return self.shortest(layers) + [part for part in self.full if part in parts]

    def shortest(self, layers: set[str]) -> list[str]:
        """The parts with exactly these layers: complete groups, then single layers in order."""
        full = [part for part, group in self.groups.items() if layers >= set(group)]
        return full + sorted(layers - {layer for part in full for layer in self.groups[part]})
