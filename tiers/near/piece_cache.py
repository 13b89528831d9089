"""Pieces of files of one size, kept in memory of a fixed size. No I/O."""

import ctypes
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterable
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from offload.types import PAGE_BYTES, round_up

Ints = NDArray[np.int64]

_ABSENT = -1

_KEPT_OF = 8
"""Where memory is full, one in so many of the pieces that were missed is kept. Rows are read in
turn: if each took the place of the least recently used one, and memory were a little too small for
all, none would be there when its turn comes. On the queries of ``benchmarks.instinfer``, memory for
half of what a step reads finds 0.43 of the next one so, and 0.00 without; for all of it, 0.79 and
0.84 (docs/near-memory.md)."""


class PieceCache:
    """Copies of pieces, least recently used first to go. Any thread may call any method.

    Invariant: pieces take up no more than the limit, but for those that are in use when it is
    lowered; they go as soon as they are given back.

    Parameters
    ----------
    max_bytes : int
        Memory is committed as it is used; less than a piece holds nothing.
    piece_bytes : int
        Of the longest piece; each takes as much, in whole pages.

    Attributes
    ----------
    num_hits, num_misses : int
    """

    def __init__(self, max_bytes: int, piece_bytes: int) -> None:
        self.piece_bytes = round_up(piece_bytes)
        self.num_hits = 0
        self.num_misses = 0
        self._lock = threading.Lock()
        capacity = max_bytes // self.piece_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(PAGE_BYTES, capacity * self.piece_bytes), flags=flags)
        self._start = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._limit = capacity
        self._places: OrderedDict[int, int] = OrderedDict()
        self._users = np.zeros(capacity, np.int32)
        self._free = list(range(capacity))
        self._dead: set[int] = set()
        self._num_denied = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are taken up now."""
        return self._num_taken() * self.piece_bytes

    def take(self, keys: Ints) -> Ints:
        """Look pieces up, and keep those that are there until ``give_back``.

        Parameters
        ----------
        keys : ndarray, int64 [n]
            Each once.

        Returns
        -------
        ndarray, int64 [n]
            Their places; -1 if they are not there.
        """
        names = keys.tolist()
        with self._lock:
            looked_up = map(self._places.get, names, repeat(_ABSENT))
            places = np.fromiter(looked_up, np.int64, len(names))
            is_there = places != _ABSENT
            self._users[places[is_there]] += 1
            for name in keys[is_there].tolist():
                self._places.move_to_end(name)
            num_hits = int(is_there.sum())
            self.num_hits += num_hits
            self.num_misses += len(names) - num_hits
        return places

    def address(self, places: Ints) -> Ints:
        """Return the host addresses of pieces that are kept."""
        return self._start + self.piece_bytes * places

    def give_back(self, places: Ints) -> None:
        """Say that pieces which ``take`` found are not needed any more."""
        with self._lock:
            self._users[places] -= 1
            if self._dead:
                done = self._dead.intersection(places[self._users[places] == 0].tolist())
                self._dead -= done
                self._release(done)

    def keep(self, keys: Ints, addresses: Ints, num_bytes: Ints) -> None:
        """Copy pieces, those for which there is room.

        Parameters
        ----------
        keys, addresses, num_bytes : ndarray, int64 [n]
            What they are, where they lie, and how long they are.
        """
        with self._lock:
            places = self._find_room(len(keys))
        names = keys[: len(places)].tolist()
        to = self.address(np.array(places, np.int64)).tolist()
        for pair in zip(to, addresses.tolist(), num_bytes.tolist(), strict=False):
            ctypes.memmove(*pair)
        with self._lock:
            for name, place in zip(names, places, strict=True):
                if name in self._places:  # another thread has missed it, too
                    self._release([place])
                else:
                    self._places[name] = place
            self._shrink()

    def drop(self, keys: Iterable[int]) -> None:
        """Forget pieces, if they are there."""
        with self._lock:
            gone = [self._places.pop(key, _ABSENT) for key in keys]
            self._retire([place for place in gone if place != _ABSENT])

    def limit(self, max_bytes: int) -> None:
        """Hold no more than so many bytes from now on, and no more than at first."""
        with self._lock:
            self._limit = min(max(0, max_bytes) // self.piece_bytes, len(self._users))
            self._shrink()

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance; nobody may be copying."""
        with self._lock:
            held = sorted([*self._places.values(), *self._free, *self._dead])
            assert held == list(range(len(self._users)))
            assert not self._users[self._free].any()
            assert self._num_taken() - len(self._dead) <= self._limit

    def _num_taken(self) -> int:
        return len(self._users) - len(self._free)

    def _find_room(self, wanted: int) -> list[int]:
        """Return places for pieces: free ones, and then some of others that are not in use."""
        num_free = max(0, min(wanted, self._limit - self._num_taken()))
        found = [self._free.pop() for _ in range(num_free)]
        self._num_denied += wanted - num_free
        num_more, self._num_denied = divmod(self._num_denied, _KEPT_OF)
        return found + [self._places.pop(name) for name in list(self._oldest(num_more))]

    def _oldest(self, wanted: int) -> Iterable[int]:
        """Yield names of pieces that are not in use; old ones are seldom."""
        for name, place in self._places.items():
            if wanted <= 0:
                return
            if not self._users[place]:
                wanted -= 1
                yield name

    def _shrink(self) -> None:
        while self._num_taken() - len(self._dead) > self._limit and self._places:
            self._retire([self._places.popitem(last=False)[1]])

    def _retire(self, places: Iterable[int]) -> None:
        """Let go of places now, or when nobody reads there any more."""
        used = {place for place in places if self._users[place]}
        self._dead |= used
        self._release(set(places) - used)

    def _release(self, places: Iterable[int]) -> None:
        for place in places:
            self._memory.madvise(mmap.MADV_DONTNEED, place * self.piece_bytes, self.piece_bytes)
            self._free.append(place)
