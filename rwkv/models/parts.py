"""The names of what an adapter can train in a block: groups of linear layers, single ones, and tensors trained whole."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"^(.*\.)?(att|ffn)(Pre)?\.(\w+)$")


def layer_of(name: str) -> str:
    """The layer of a block from a module's name: blocks.3.att.key and blocks.0.ffnPre.key are att.key and ffn.key."""
    return _LAYER.sub(r"\2.\4", name)


@dataclass(frozen=True)
class Parts:
    """What an adapter of one version can consist of.

    Attributes:
        groups: linear layers that get adapters, by the part's name.
        single: further layers; each layer of a block is a part, too.
        whole: patterns of the names of tensors trained whole, by the part's name.
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
        """All names of parts."""
        return (*self.groups, *self.whole, *self.layers)

    def layers_of(self, part: str) -> tuple[str, ...]:
        """The layers of a block that a part gives adapters to; none for those trained whole."""
        return () if part in self.whole else self.groups.get(part, (part,))

    def trained_whole(self, name: str, parts: Collection[str]) -> bool:
        """Whether the parts include this parameter as one trained whole."""
        return any(re.search(self.whole[part], name) for part in parts if part in self.whole)

    def normal(self, parts: Collection[str]) -> list[str]:
        """The parts in normal form: groups where all their layers are named, single layers in order, then those trained whole."""
        layers = {layer for part in parts for layer in self.layers_of(part)}
        return self.shortest(layers) + [part for part in self.whole if part in parts]

    def shortest(self, layers: set[str]) -> list[str]:
        """Parts that name exactly these layers: groups that are complete, and single layers in order."""
        full = [part for part, group in self.groups.items() if layers >= set(group)]
        return full + sorted(layers - {layer for part in full for layer in self.groups[part]})
