"""One worker as the tier sees it: its share of chunks and calls, by way of shared memory."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.tiers.near.bus import BusBytes, BusMeter
from offload.tiers.near.frames import Frames
from offload.tiers.near.link import WorkerLink
from offload.tiers.near.messages import Attend, Body, Forget, Lane, Read, Write
from offload.tiers.near.place import WorkerPlace
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.near.tables import update_of
from offload.tiers.near.wire import CallFormat
from offload.tiers.read_meter import Fetched
from offload.types import ChunkInfo, Partial, SlotId

Row = tuple[int, NDArray[np.int64]]
"""What is attended for one row of a batch: a name, by which the worker knows what it consisted of
last time, and the slots of its chunks in order."""


class Member:
    """A worker, and the frames through which chunks, queries and answers go.

    Any thread may call. Calls wait for frames, not for the worker.

    Parameters
    ----------
    place : WorkerPlace
    link : WorkerLink
    bus : BusMeter
    deadline_s : float
        Longest wait for a frame.
    """

    def __init__(
        self, place: WorkerPlace, link: WorkerLink, bus: BusMeter, deadline_s: float
    ) -> None:
        self.place = place
        self.link = link
        self._bus = bus
        self._deadline_s = deadline_s
        self._fetched = Fetched(0, 0)
        self._lock = threading.Lock()
        config, memory = link.config, link.memory.bytes
        chunks = config.frame_bytes * config.num_frames
        self._frames = Frames(memory[:chunks], config.frame_bytes)
        self._calls = Frames(memory[chunks:], config.call_bytes)

    def write(
        self,
        what: str,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        lanes: Sequence[Lane],
        src: Sequence[Tensor],
        stored: Callable[[range], None],
    ) -> Iterator["Future[None]"]:
        """Begin to write this worker's part of chunks; ``stored`` is told which were."""
        for part in self._bursts(len(slots)):
            frames = self._frames.take(len(part), self._deadline_s, what)
            for number, i in zip(frames, part, strict=True):
                content = self.place.part_of(src[i])
                self._frames[number][: content.numel()] = content
            cut = slice(part.start, part.stop)
            body = Write(slots[cut], infos[cut], lanes[cut], frames)
            self._bus.add(BusBytes(written=len(part) * self.place.layout.chunk_bytes))
            asked = self.link.ask(what, _always(body))
            yield _then(asked, _ignoring(stored, part), partial(self._frames.give, frames))

    def read(
        self,
        what: str,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        out: Sequence[Tensor],
    ) -> Iterator["Future[None]"]:
        """Begin to fetch this worker's part of chunks."""
        for part in self._bursts(len(slots)):
            frames = self._frames.take(len(part), self._deadline_s, what)
            cut = slice(part.start, part.stop)
            asked = self.link.ask(what, _always(Read(slots[cut], infos[cut], frames)))
            copy = partial(self._copy_out, frames, out[cut])
            yield _then(asked, copy, partial(self._frames.give, frames))

    def attend(
        self, query: Tensor, rows: Sequence[Row], scale: float, how: SparF | None
    ) -> Iterator["Future[Partial]"]:
        """Begin to attend for some rows of a batch.

        Parameters
        ----------
        query : Tensor, shape (num_rows, num_heads, key_dim)
            Those that ask this worker's heads.
        rows : sequence of Row
        scale : float
        how : SparF or None

        Yields
        ------
        Future
            Of the answers to some of the rows, in order.
        """
        layout = self.place.layout
        fmt = CallFormat(query.shape[1], layout.key_dim, layout.value_dim, query.dtype)
        each = fmt.num_rows(self.link.config.call_bytes)
        for start in range(0, len(rows), each):
            some, asked = rows[start : start + each], query[start : start + each]
            what = f"disk attend of {len(some)} rows, {sum(len(row[1]) for row in some)} chunks"
            [call] = self._calls.take(1, self._deadline_s, what)
            fmt.put_query(self._calls[call], asked)

            make = partial(self._make_attend, fmt, some, call, scale, how)
            answer = partial(self._take_answer, fmt, len(some), call)
            yield _then(self.link.ask(what, make), answer, partial(self._calls.give, [call]))

    def forget(self, body: Forget) -> "Future[Any]":
        """Begin to drop chunks and rows."""

        def make(known: dict[int, Any]) -> Forget:
            for name in body.rows:
                known.pop(name, None)
            return body

        return self.link.ask(f"disk: forget {len(body.slots)} chunks", make)

    def close(self) -> None:
        """End the worker. Idempotent."""
        self.link.close()
        self._frames.close()
        self._calls.close()

    def _count(self, so_far: Fetched, answered: int) -> None:
        with self._lock:
            # A worker that took over counts from nothing.
            known = self._fetched if so_far.num_reads >= self._fetched.num_reads else Fetched(0, 0)
            self._fetched = so_far
        num_bytes, reads = (now - then for now, then in zip(so_far, known, strict=True))
        self._bus.add(BusBytes(answered=answered, read=num_bytes, num_reads=reads))

    def _bursts(self, n: int) -> Iterator[range]:
        """Divide a request so that one part fills frames while another drains."""
        step = max(1, self._frames.count // 2)
        for start in range(0, n, step):
            yield range(start, min(n, start + step))

    def _copy_out(self, frames: Sequence[int], out: Sequence[Tensor], _: Any) -> None:
        for number, buffer in zip(frames, out, strict=True):
            target = self.place.part_of(buffer)
            target.copy_(self._frames[number][: target.numel()])
        self._bus.add(BusBytes(fetched=len(frames) * self.place.layout.chunk_bytes))

    def _make_attend(
        self,
        fmt: CallFormat,
        rows: Sequence[Row],
        call: int,
        scale: float,
        how: SparF | None,
        known: dict[int, Any],
    ) -> Attend:
        tables = [update_of(known, *row) for row in rows]
        changed = sum(table.added.nbytes for table in tables)
        self._bus.add(BusBytes(asked=len(rows) * fmt.query_bytes + changed))
        name = str(fmt.dtype).removeprefix("torch.")
        return Attend(tables, call, fmt.num_heads, name, scale, how)

    def _take_answer(self, fmt: CallFormat, num_rows: int, call: int, so_far: Fetched) -> Partial:
        self._count(so_far, num_rows * fmt.answer_bytes)
        return fmt.answer(self._calls[call], num_rows)


def _then(
    asked: "Future[Any]", finish: Callable[[Any], Any], always: Callable[[], None]
) -> "Future[Any]":
    """Return a future of what ``finish`` makes of an answer; ``always`` comes after it."""
    result: Future[Any] = Future()
    result.set_running_or_notify_cancel()  # a worker cannot be stopped half-way

    def done(answered: "Future[Any]") -> None:
        try:
            value = finish(answered.result())
        except Exception as error:
            always()
            result.set_exception(error)
        else:
            always()
            result.set_result(value)

    asked.add_done_callback(done)
    return result


def _ignoring(call: Callable[[range], None], part: range) -> Callable[[Any], None]:
    return lambda _: call(part)


def _always(body: Body) -> Callable[[Any], Body]:
    return lambda _: body
