"""Names of the parts that an adapter can train: groups of linear layers, single layers, and tensors
trained directly.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"^(.*\.)?(att|ffn)(Pre)?\.(\w+)$")


def layer_of(name: str) -> str:
    """The layer's name within a block, e.g. att.key for blocks.3.att.key, and ffn.key for
    blocks.0.ffnPre.key.
    """
    return _LAYER.sub(r"\2.\4", name)


@dataclass(frozen=True)
class Parts:
    """The parts of adapters of one version.

    Attributes:
        groups: linear layers that get adapters, by name of the part.
        single: further layers. Every layer is also a part by its own name.
        whole: regular expressions for tensors that are trained directly, by name of the part.
    """

    groups: Mapping[str, tuple[str, ...]]
    single: tuple[str, ...]
    whole: Mapping[str, str]

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers of a block that can have an adapter."""
        return tuple(dict.fromkeys([layer for group in self.groups.values() for layer in group] + [*self.single]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parts."""
        return (*self.groups, *self.whole, *self.layers)

    def layers_of(self, part: str) -> tuple[str, ...]:
        """Layers of a block that get adapters; empty for parts trained directly."""
        return () if part in self.whole else self.groups.get(part, (part,))

    def trained_whole(self, name: str, parts: Collection[str]) -> bool:
        """Whether this parameter is trained directly as one of these parts."""
        return any(re.search(self.whole[part], name) for part in parts if part in self.whole)

    def normal(self, parts: Collection[str]) -> list[str]:
        """Normal form: groups of which all layers are given, single layers sorted, parts trained
        directly.
        """
        layers = {layer for part in parts for layer in self.layers_of(part)}
        return self.shortest(layers) + [part for part in self.whole if part in parts]

    def shortest(self, layers: set[str]) -> list[str]:
        """The fewest parts with exactly these layers: complete groups, then single layers
        sorted.
        """
        full = [part for part, group in self.groups.items() if layers >= set(group)]
        return full + sorted(layers - {layer for part in full for layer in self.groups[part]})
