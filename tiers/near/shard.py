"""One worker's part of the disk tier: what it holds, and what it does when it is asked."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.tiers.near.attention import RowChunks, ShardAttention, empty_partial
from offload.tiers.near.channel_store import ChannelStore
from offload.tiers.near.messages import (
    Adopt,
    Ask,
    Attend,
    Body,
    Forget,
    Read,
    TableUpdate,
    WorkerConfig,
    Write,
)
from offload.tiers.near.piece_cache import PieceCache
from offload.tiers.near.records import ShardRecords
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.near.wire import CallFormat
from offload.tiers.read_meter import Fetched
from offload.types import Partial

_NOTHING = np.empty(0, np.int64)


class Shard:
    """Records and channels of some KV heads, and threads that work on them.

    ``handle`` is called by one thread; what it starts runs on others.

    Parameters
    ----------
    config : WorkerConfig
    shared : Tensor, uint8 [config.shared_bytes]
        Frames for chunks, then those for calls.
    """

    def __init__(self, config: WorkerConfig, shared: Tensor) -> None:
        self._config = config
        chunks = config.frame_bytes * config.num_frames
        self._frames = shared[:chunks].view(config.num_frames, config.frame_bytes)
        self._calls = shared[chunks:].view(config.num_calls, config.call_bytes)
        self._records = ShardRecords(
            config.directory,
            config.token,
            config.layout,
            fingerprint=config.fingerprint,
            num_threads=config.num_threads,
            deadline_s=config.deadline_s,
        )
        cache = PieceCache(config.memory_bytes * config.has_channels, config.block_tokens)
        self._channels = (
            ChannelStore(
                config.directory,
                config.layout,
                token=config.token,
                block_tokens=config.block_tokens,
                memory_bytes=config.memory_bytes,
                cache=cache,
            )
            if config.has_channels
            else None
        )
        pool = partial(ThreadPoolExecutor, config.num_threads)
        self._ahead = pool(thread_name_prefix="near-ahead")
        self._moving = pool(thread_name_prefix="near-move")
        self._attending = pool(thread_name_prefix="near-attend")
        self._attention = ShardAttention(self._records, self._channels, cache, self._ahead)
        self._rows: dict[int, RowChunks] = {}
        self._attended = 0
        self._lock = threading.Lock()

    def handle(self, body: Body, answer: Callable[[Any, Exception | None], None]) -> None:
        """Begin what a request asks for; ``answer`` gets its value or its error, on any thread."""
        if isinstance(body, Attend):
            self._start_attend(body, answer)
            return
        works: dict[type, Callable[[Any], Any]] = {
            Write: self._write,
            Read: self._read,
            Adopt: self._adopt,
            Forget: self._forget,
            Ask: lambda _: self.counters(),
        }
        work = works[type(body)]
        if isinstance(body, Write | Read):
            self._moving.submit(_answering, partial(work, body), answer)
        else:  # in the order in which they come
            _answering(partial(work, body), answer)

    def counters(self) -> dict[str, int]:
        """Return what was read and attended, and what the channels take up."""
        counted = {"attended_rows": self._attended, **self._fetched()._asdict()}
        if self._channels is not None:
            counted |= {f"channel_{name}": n for name, n in self._channels.stats().items()}
        return counted

    def _fetched(self) -> Fetched:
        return self._attention.meter.fetched

    def close(self) -> None:
        """End every thread. Files stay. Idempotent."""
        for pool in (self._attending, self._moving, self._ahead):
            pool.shutdown(cancel_futures=True)
        self._records.close()
        if self._channels is not None:
            self._channels.close(remove=False)

    def _write(self, body: Write) -> None:
        frames = self._slots_of(body.frames)
        self._records.write(body.slots, body.infos, frames)
        if self._channels is not None:
            self._attention.add_channels(list(body.slots), list(body.lanes), frames)

    def _read(self, body: Read) -> None:
        self._records.read(body.slots, body.infos, self._slots_of(body.frames))

    def _adopt(self, body: Adopt) -> None:
        self._records.adopt(body.slots, body.infos)
        if self._channels is not None:
            self._channels.retain(body.slots)

    def _forget(self, body: Forget) -> list[bool]:
        for name in body.rows:
            self._rows.pop(name, None)
        if self._channels is not None:
            self._channels.forget(body.slots)
            self._attention.forget(body.slots)
        return self._records.forget(body.slots, body.holes, body.dead_segments)

    def _slots_of(self, frames: Sequence[int]) -> list[Tensor]:
        return [self._frames[number][: self._config.layout.slot_bytes] for number in frames]

    def _start_attend(self, body: Attend, answer: Callable[[Any, Exception | None], None]) -> None:
        layout, frame = self._config.layout, self._calls[body.call]
        dtype = getattr(torch, body.dtype_name)
        fmt = CallFormat(body.num_heads, layout.key_dim, layout.value_dim, dtype)
        rows = [self._update(table) for table in body.tables]
        query = fmt.query(frame, len(rows), body.scale)
        query = query.unflatten(1, (layout.num_kv_heads, -1))

        def attend(number: int) -> None:
            found = self._attend(query[number].contiguous(), rows[number], body.how)
            fmt.put_answer(frame, len(rows), number, found)

        jobs = [self._attending.submit(attend, number) for number in range(len(rows))]
        _when_all(jobs, lambda error: answer(self._fetched(), error))

    def _attend(self, query: Tensor, row: RowChunks, how: SparF | None) -> Partial:
        with self._lock:
            self._attended += 1
        if not len(row.slots):
            return empty_partial(query, self._config.layout.value_dim)
        if how is None:
            return self._attention.dense(query, row.slots)
        return self._attention.sparse(query, row, how)

    def _update(self, update: TableUpdate) -> RowChunks:
        known = self._rows.get(update.key)
        slots = _NOTHING if known is None else known.slots
        if known is None or len(update.added) or update.kept != len(slots):
            known = RowChunks(np.concatenate([slots[: update.kept], update.added]))
            self._rows[update.key] = known
        return known


def _answering(work: Callable[[], Any], answer: Callable[[Any, Exception | None], None]) -> None:
    try:
        value = work()
    except Exception as error:
        answer(None, error)
    else:
        answer(value, None)


def _when_all(futures: Sequence[Future[None]], answer: Callable[[Exception | None], None]) -> None:
    """Answer when the last of some rows is done, with the first error if there is one."""
    left, lock = len(futures), threading.Lock()

    def one_done(_: Future[None]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        errors = [future.exception() for future in futures]
        answer(next((error for error in errors if isinstance(error, Exception)), None))

    for future in futures:
        future.add_done_callback(one_done)
