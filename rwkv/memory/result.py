"""The result of an estimate: bytes by part, on a device in each phase of a step and on the host."""

from dataclasses import dataclass


@dataclass
class Estimate:
    """Bytes by part: per device at the peak of each phase of a step (`phase_parts`), and per
    machine in host memory.

    All parts of a phase but `process` and `heap` are allocated by torch.
    """

    phase_parts: dict[str, dict[str, int]]
    host: dict[str, int]

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase, per device."""
        return {name: sum(parts.values()) for name, parts in self.phase_parts.items()}

    @property
    def device(self) -> dict[str, int]:
        """The parts in the phase with the highest peak."""
        return max(self.phase_parts.values(), key=lambda parts: sum(parts.values()))

    @property
    def tensors(self) -> dict[str, int]:
        """The peak of each phase in torch's allocator."""
        others = ("process", "heap")
        return {
            name: sum(size for part, size in parts.items() if part not in others)
            for name, parts in self.phase_parts.items()
        }

    @property
    def total(self) -> int:
        """The peak per device."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Host memory per machine."""
        return sum(self.host.values())
