"""The parts of a simulated box that hold blocks and move bytes."""

from collections import OrderedDict
from collections.abc import Iterable


class Link:
    """One server, first come, first served: a bus, a disk, a network link, a processor.

    Attributes
    ----------
    num_bytes, num_operations : int
        Of all that has come so far, served or still waiting.
    """

    def __init__(self) -> None:
        self._taken_s = 0.0
        self.num_bytes = 0
        self.num_operations = 0
        self._free_s = 0.0

    def begin_s(self, now_s: float) -> float:
        """Return when something that comes now is served."""
        return max(now_s, self._free_s)

    def busy_s(self, now_s: float) -> float:
        """Return the time of service that was given until now."""
        return max(0.0, self._taken_s - max(0.0, self._free_s - now_s))

    def use(
        self, now_s: float, service_s: float, num_bytes: int = 0, num_operations: int = 1
    ) -> float:
        """Queue something; return when it is done."""
        self._free_s = self.begin_s(now_s) + service_s
        self._taken_s += service_s
        self.num_bytes += num_bytes
        self.num_operations += num_operations
        return self._free_s


class BlockTier:
    """Names of the blocks that a tier holds; those used longest ago leave first.

    Parameters
    ----------
    capacity : int
        Blocks.
    most_idle_s : float or None
        Blocks that are not used for longer have left.
    """

    def __init__(self, capacity: int, most_idle_s: float | None = None) -> None:
        self._capacity = capacity
        self._most_idle_s = most_idle_s
        self._used_s: OrderedDict[int, float] = OrderedDict()
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._used_s)

    def has(self, block: int, now_s: float) -> bool:
        """Whether a block is here; does not count as a use."""
        used_s = self._used_s.get(block)
        if used_s is None:
            return False
        return self._most_idle_s is None or now_s - used_s <= self._most_idle_s

    def drop(self, blocks: Iterable[int]) -> None:
        """Have blocks here no more."""
        for block in blocks:
            self._used_s.pop(block, None)

    def use(self, blocks: Iterable[int], now_s: float) -> None:
        """Have blocks here, used now; others leave for them."""
        held = self._used_s
        for block in blocks:
            held[block] = now_s
            held.move_to_end(block)
        while len(held) > self._capacity:
            held.popitem(last=False)
            self.num_evicted += 1
