"""Which block lies in which slot, and which goes when there is no room. No I/O."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from offload.plugins.namespace import Key


@dataclass(slots=True, eq=False)
class Entry:
    """A slot that is not free.

    Attributes
    ----------
    key : bytes
    slot : int
    num_users : int
        Reads and writes under way; while there are any, the slot goes to nobody else.
    is_ready : bool
        Whether it can be read.
    is_known : bool
        Whether its key leads to it.
    """

    key: Key
    slot: int
    num_users: int = 0
    is_ready: bool = True
    is_known: bool = True


class SlotTable:
    """Slots of one size, by key, the least recently used first to go.

    Invariant: every slot is free or of one entry; a key leads to at most one entry; an entry that
    no key leads to has users. Not thread-safe.

    Parameters
    ----------
    num_slots : int
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._forgotten: set[Entry] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def restore(self, found: Iterable[tuple[int, Key]]) -> None:
        """Fill an empty table with slots and their keys; of equal keys the first one stays."""
        for slot, key in found:
            self._entries.setdefault(key, Entry(key, slot))
        taken = {entry.slot for entry in self._entries.values()}
        self._free = [slot for slot in self._free if slot not in taken]

    def holds(self, key: Key) -> bool:
        """Whether a key can be read."""
        entry = self._entries.get(key)
        return entry is not None and entry.is_ready

    def touch(self, key: Key) -> bool:
        """Make a key the most recently used; False if it leads nowhere."""
        if key not in self._entries:
            return False
        self._entries.move_to_end(key)
        return True

    def claim(self, key: Key) -> Entry | None:
        """Return the entry of a key that can be read, with one more user; or None."""
        if not self.holds(key):
            return None
        self._entries.move_to_end(key)
        entry = self._entries[key]
        entry.num_users += 1
        return entry

    def reserve(self, key: Key) -> Entry | None:
        """Return a new entry to be written, with one user; None if all slots are in use.

        The key must be unknown. The least recently used entry without users makes room.
        """
        assert key not in self._entries
        if not self._free and not self._evict():
            return None
        entry = Entry(key, self._free.pop(), num_users=1, is_ready=False)
        self._entries[key] = entry
        return entry

    def forget(self, entry: Entry) -> None:
        """Make a key lead nowhere; its slot is free when the last user is gone."""
        if entry.is_known:
            del self._entries[entry.key]
            entry.is_known = False
            self._forgotten.add(entry)

    def release(self, entry: Entry) -> None:
        """Take one user away."""
        entry.num_users -= 1
        if not entry.is_known and not entry.num_users:
            self._forgotten.remove(entry)
            self._free.append(entry.slot)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        taken = [entry.slot for entry in (*self._entries.values(), *self._forgotten)]
        assert sorted((*taken, *self._free)) == list(range(self.num_slots))
        assert all(entry.num_users > 0 and not entry.is_known for entry in self._forgotten)
        assert all(entry.key == key and entry.is_known for key, entry in self._entries.items())

    def _evict(self) -> bool:
        victim = next((entry for entry in self._entries.values() if not entry.num_users), None)
        if victim is None:
            return False
        del self._entries[victim.key]
        self._free.append(victim.slot)
        self.num_evicted += 1
        return True
