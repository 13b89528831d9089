"""A tier around another one: what wrappers do not change."""

from collections.abc import Collection
from typing import Any

from offload.errors import ConfigError
from offload.tiers.base import ReadsParts, Tier
from offload.types import SlotId


class WrappedTier(Tier):
    """Passes everything on but reads and writes, which subclasses do in their way.

    Parameters
    ----------
    inner : Tier
        Closed with this one.
    """

    def __init__(self, inner: Tier) -> None:
        self.name = inner.name
        self.capacity_bytes = inner.capacity_bytes
        self.slot_bytes = inner.slot_bytes
        self.inner = inner

    @property
    def num_slots(self) -> int:
        """Slots of the tier inside."""
        return self.inner.num_slots

    @property
    def num_free(self) -> int:
        """Free slots of the tier inside."""
        return self.inner.num_free

    @property
    def used_bytes(self) -> int:
        """Bytes that the tier inside occupies."""
        return self.inner.used_bytes

    @property
    def part_bytes(self) -> int:
        """Bytes of the smallest part that can be read; no attribute where there are no parts."""
        inner: Any = self.inner
        return int(inner.part_bytes)

    @property
    def parts_per_head(self) -> int:
        """How many of them a KV head has; as ``part_bytes``."""
        inner: Any = self.inner
        return int(inner.parts_per_head)

    @property
    def inner_parts(self) -> ReadsParts:
        """The tier inside, as one of which parts can be read.

        Raises
        ------
        ConfigError
            It reads whole chunks only.
        """
        if not isinstance(self.inner, ReadsParts):
            raise ConfigError(f"the {self.name} tier reads whole chunks only")
        return self.inner

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take slots; see ``Tier``."""
        return self.inner.allocate(n, stream)

    def num_free_for(self, stream: int, group: int) -> int:
        """Return how many slots a stream can take; see ``Tier``."""
        return self.inner.num_free_for(stream, group)

    def is_own(self, slot: SlotId) -> bool:
        """Whether freeing a slot makes room; see ``Tier``."""
        return self.inner.is_own(slot)

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; see ``Tier``."""
        self.inner.free(slots)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        self.inner.check_integrity()

    def close(self) -> None:
        """Close the tier inside. Idempotent."""
        self.inner.close()
