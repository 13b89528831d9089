"""One worker as the tier sees it: its share of chunks and calls, by way of shared memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.tiers.near.bus import BusMeter
from offload.tiers.near.frames import Frames
from offload.tiers.near.link import WorkerLink
from offload.tiers.near.messages import Attend, Body, Forget, Lane, Read, Write
from offload.tiers.near.place import WorkerPlace
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.near.tables import update_of
from offload.tiers.near.wire import CallFormat
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
            body = Write(*(_pick(each, part) for each in (slots, infos, lanes)), frames)
            self._bus.add(written=len(part) * self.place.layout.chunk_bytes)
            yield self._then(
                self.link.ask(what, _always(body)),
                lambda _, part=part: stored(part),
                lambda frames=frames: self._frames.give(frames),
            )

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
            body = Read(_pick(slots, part), _pick(infos, part), frames)

            def copy(_: Any, part: range = part, frames: list[int] = frames) -> None:
                for number, i in zip(frames, part, strict=True):
                    target = self.place.part_of(out[i])
                    target.copy_(self._frames[number][: target.numel()])
                self._bus.add(fetched=len(part) * self.place.layout.chunk_bytes)

            yield self._then(
                self.link.ask(what, _always(body)),
                copy,
                lambda frames=frames: self._frames.give(frames),
            )

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

            def make(known: dict[int, Any], some: Sequence[Row] = some, call: int = call) -> Attend:
                tables = [update_of(known, *row) for row in some]
                self._bus.add(
                    asked=len(some) * fmt.query_bytes + sum(each.added.nbytes for each in tables)
                )
                name = str(query.dtype).removeprefix("torch.")
                return Attend(tables, call, query.shape[1], name, scale, how)

            def answer(_: Any, number: int = len(some), call: int = call) -> Partial:
                self._bus.add(answered=number * fmt.answer_bytes)
                return fmt.answer(self._calls[call], number)

            yield self._then(
                self.link.ask(what, make), answer, lambda call=call: self._calls.give([call])
            )

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

    def _bursts(self, n: int) -> Iterator[range]:
        """Divide a request so that one part fills frames while another drains."""
        step = max(1, self._frames.count // 2)
        for start in range(0, n, step):
            yield range(start, min(n, start + step))

    def _then(
        self,
        asked: "Future[Any]",
        finish: Callable[[Any], Any],
        always: Callable[[], None],
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


def _always(body: Body) -> Callable[[Any], Body]:
    return lambda _: body


def _pick(items: Sequence[Any], part: range) -> list[Any]:
    return list(items[part.start : part.stop])
