"""Stream groups of chunks through a ring of staging buffers, the next ones loading meanwhile."""

import time
from collections.abc import Generator, Sequence
from typing import Protocol

from offload.prefetch.plan import LoadGroup
from offload.stats import Counters


class Loading(Protocol):
    """A load in flight."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the buffer can be read by compute; raises what the load raised."""
        ...

    def done(self) -> bool:
        """Whether the load has ended, well or badly."""
        ...


class Loader(Protocol):
    """What the stream needs from the store: loads into numbered staging buffers."""

    def start(self, group: LoadGroup, buffer: int) -> Loading:
        """Begin to fill a buffer. The buffer is not in use by compute any more."""
        ...

    def release(self, group: LoadGroup, buffer: int, *, used: bool) -> None:
        """Compute has been told to read the buffer (``used``), or the load was for nothing."""
        ...


class ChunkStream:
    """Reads groups in order through ``num_buffers`` staging buffers.

    Exact attention reads the same groups in the same order at every step, so what comes next is
    known: while one group is attended, the following ones load, across the end of the layer into
    the next, and from the last layer into the first one of the next step. A guess that turns out
    wrong (the rows were reordered, say) costs a read, never a wrong result: chunks are immutable, a
    buffer is used only for exactly the chunks it was filled with.

    Only the thread that runs the model calls methods.
    """

    def __init__(
        self, loader: Loader, num_buffers: int, counters: Counters, deadline_s: float
    ) -> None:
        self._loader = loader
        self._counters = counters
        self._deadline_s = deadline_s
        self._free = list(range(num_buffers))
        self._loading: dict[LoadGroup, tuple[int, Loading]] = {}
        self._num_buffers = num_buffers

    def read(
        self, groups: Sequence[LoadGroup], upcoming: Sequence[LoadGroup]
    ) -> Generator[tuple[LoadGroup, int], None, None]:
        """Yield each group with the buffer that holds it, valid until the next one is asked for.

        Parameters
        ----------
        groups : sequence of LoadGroup
            What is needed now, in order.
        upcoming : sequence of LoadGroup
            What will probably be needed next.

        Raises
        ------
        TransferTimeout, CorruptChunk, StorageError
            A load failed; its chunks are unchanged in the tier below, and all buffers are usable.
        """
        order = [*groups, *upcoming]
        for i, group in enumerate(groups):
            if group in self._loading:
                self._counters.prefetched_groups += 1
            else:
                self._counters.demanded_groups += 1
            self._top_up(order[i : i + self._num_buffers])
            buffer, loading = self._loading[group]
            self._wait(group, loading)
            del self._loading[group]
            try:
                yield group, buffer
            finally:
                self._loader.release(group, buffer, used=True)
                self._free.append(buffer)
        self._top_up(order[len(groups) : len(groups) + self._num_buffers])

    def drain(self) -> None:
        """Wait for every load in flight and forget it."""
        for group in list(self._loading):
            self._discard(group)

    def _top_up(self, wanted: Sequence[LoadGroup]) -> None:
        for group in wanted:
            if group in self._loading:
                continue
            if not self._free:
                self._recycle(wanted)
            if not self._free:
                return
            buffer = self._free[-1]
            self._loading[group] = (buffer, self._loader.start(group, buffer))
            self._free.pop()  # only now: a load that could not start has no buffer

    def _recycle(self, wanted: Sequence[LoadGroup]) -> None:
        """Free a buffer that was filled on a wrong guess."""
        for group in self._loading:
            if group not in wanted:
                self._discard(group)
                return

    def _wait(self, group: LoadGroup, loading: Loading) -> None:
        started = time.perf_counter()
        try:
            loading.wait(self._deadline_s)
        except BaseException:
            if loading.done():
                self._forget(group)
            raise
        finally:
            self._counters.load_wait_s += time.perf_counter() - started

    def _discard(self, group: LoadGroup) -> None:
        _, loading = self._loading[group]
        try:
            loading.wait(self._deadline_s)
        except TimeoutError:
            raise
        except OSError:
            # Nobody asked for this group after all; whoever does will meet the error.
            self._counters.failed_prefetches += 1
        self._forget(group)

    def _forget(self, group: LoadGroup) -> None:
        buffer, _ = self._loading.pop(group)
        self._loader.release(group, buffer, used=False)
        self._free.append(buffer)
