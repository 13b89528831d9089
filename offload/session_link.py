"""The bond between a running cache and a session store: which of its chunks lie there."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from offload.chunk_reader import start_read
from offload.engine import Engine
from offload.errors import ConfigError
from offload.runtime import Runtime
from offload.sessions.keys import record_id
from offload.sessions.namespace import Namespace
from offload.sessions.opening import Held
from offload.sessions.saving import Column, Content, Saved
from offload.sessions.session_file import BlockRef
from offload.sessions.store import SessionStore
from offload.table import ChunkTable
from offload.types import ChunkId, ChunkInfo, SlotId

_TAIL = "tail."


class SessionLink:
    """Chunks of one cache, and of its forks, that lie in one session store.

    They are read from where they lie: the disk tier adopts their records. What the store has is
    never written to it again.

    Parameters
    ----------
    store : SessionStore
    owns_store : bool
        Close the store with the cache.
    """

    def __init__(self, store: SessionStore, *, owns_store: bool) -> None:
        self.store = store
        self._owns_store = owns_store
        self._known: dict[Column, BlockRef] = {}
        # The chunks that stand for a record: only they may have adopted it, and who restores it
        # while they live shares them.
        self._owners: dict[BlockRef, Column] = {}
        self._held: list[Held] = []

    @property
    def key(self) -> tuple[Path, str]:
        """Root and salt of the store: two tenants of one root have nothing in common."""
        return self.store.path, self.store.salt

    def trim(self, engine: Engine) -> None:
        """Forget chunks that no cache has any more, and let go of what only they needed.

        For who saves and closes forks for days, while others of the same cache stay open. The
        caller holds the engine's lock.
        """
        table = engine.store.table
        self._known = {
            column: ref
            for column, ref in self._known.items()
            if all(chunk in table for chunk in column)
        }
        self._owners = {
            ref: column
            for ref, column in self._owners.items()
            if any(chunk in table for chunk in column)
        }
        needed = {ref.segment for ref in self._known.values()}
        kept: list[Held] = []
        for held in reversed(self._held):
            if needed.isdisjoint(held.shapes):
                held.release()
            else:
                needed -= set(held.shapes)
                kept.insert(0, held)
        self._held = kept

    def content(
        self,
        runtime: Runtime,
        namespace: Namespace,
        token_ids: Tensor | None,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> Content:
        """Return what a cache holds, to be saved. The caller holds the engine's lock till then.

        Parameters
        ----------
        runtime : Runtime
        namespace : Namespace
        token_ids : Tensor or None, int64 [num_rows, num_tokens]
        tensors, state : mapping
            Of the layers that are not offloaded.
        """
        layers = sorted(runtime.layers)
        engine = runtime.engine
        rows = _columns(runtime, layers)
        tails = {
            f"{_TAIL}{index}": runtime.layers[index].read_after(len(rows[0])).cpu()
            for index in layers
        }
        return Content(
            namespace=namespace,
            layout=engine.layout,
            layers=tuple(layers),
            num_tokens=common_length(runtime),
            rows=rows,
            read=partial(start_read, engine.tiers, engine.store.table),
            token_ids=token_ids,
            tensors={**tails, **tensors},
            state=state,
            known=self._known,
        )

    def adopt_saved(self, runtime: Runtime, saved: Saved, *, is_shared: bool) -> None:
        """Read from the store what was saved to it, and give back the room of the other copies.

        Parameters
        ----------
        runtime : Runtime
        saved : Saved
        is_shared : bool
            Whether forks may need chunks that are not in what was saved.
        """
        engine, layers = runtime.engine, sorted(runtime.layers)
        engine.stream.drain()
        engine.store.reap()
        columns = {
            column: position
            for row in _columns(runtime, layers)
            for position, column in enumerate(row)
            if self._known.get(column) != saved.refs[column]
            and self._own(saved.refs[column], column, engine.store.table)
        }
        for number, layer in enumerate(layers):
            engine.store.adopt_copies(_copies(engine, saved, columns, number, layer))
        earlier, self._held = self._held, [saved.held]
        if is_shared:
            self._known.update(saved.refs)
            self._held += earlier
        else:
            self._known = dict(saved.refs)
            self._owners = {ref: column for column, ref in saved.refs.items()}
            for held in earlier:
                held.release()

    def restore(
        self,
        runtime: Runtime,
        held: Held,
        layers: Sequence[int],
        tails: Mapping[str, Tensor] | None,
    ) -> None:
        """Fill a runtime that was just opened with the chunks of a store. No chunk is read.

        Those that a fork has already are shared with it, wherever they are.

        Parameters
        ----------
        runtime : Runtime
        held : Held
            Let go of when the cache is closed or reset.
        layers : sequence of int
            Model layers, in the order of the records.
        tails : mapping of str to Tensor, optional
            ``tail.<layer>`` of each; none: the sequence ends with its last full chunk.
        """
        engine = runtime.engine
        self._held.append(held)
        by_layer: list[list[list[ChunkId]]] = []
        with engine.lock:
            for number, index in enumerate(layers):
                sequence = runtime.layer(index)
                columns = _adopt_layer(engine, held, number, index, self._owners)
                tail = sequence.tail[:, :, :0] if tails is None else tails[f"{_TAIL}{index}"]
                sequence.restore(columns, tail.to(sequence.tail.device))
                by_layer.append(columns)
        for row, refs in enumerate(held.rows):
            for position, ref in enumerate(refs):
                column = tuple(columns[position][row] for columns in by_layer)
                self._known[column] = ref
                self._owners[ref] = column

    def report_damage(self, engine: Engine) -> None:
        """Have the store look again at the records that a read could not verify."""
        if engine.disk is None:
            return
        suspects = set(engine.disk.take_suspects())
        if not suspects:
            return
        size, expected = engine.disk.record_bytes, {}
        for chunk in engine.store.table:
            entry = engine.store.table[chunk]
            slot = entry.slots.get(len(engine.tiers) - 1)
            if slot is not None:
                path, offset, _ = engine.disk.place_of(slot)
                if (path, offset // size) in suspects:
                    expected[path, offset // size] = entry.info
        fingerprints = {
            held.root.paths.segment(name): held.fingerprint
            for held in self._held
            for name in held.shapes
        }
        for (path, index), info in expected.items():
            if path in fingerprints:
                self.store.recheck(path, engine.layout, fingerprints[path], [(index, info)])

    def _own(self, ref: BlockRef, column: Column, table: ChunkTable) -> bool:
        """Have some chunks stand for a record, unless others do; return whether they do now."""
        owner = self._owners.get(ref)
        if owner is None or not any(chunk in table for chunk in owner):
            owner = self._owners[ref] = column
        return owner == column

    def forget(self) -> None:
        """Let go of every chunk: the cache has none any more."""
        held, self._held = self._held, []
        self._known, self._owners = {}, {}
        for lease in held:
            lease.release()

    def close(self) -> None:
        """Let go of everything, and of the store if it is ours. Idempotent."""
        if self._owns_store:
            self._held = []
            self.store.close()
        else:
            self.forget()


def common_length(runtime: Runtime) -> int:
    """Return the tokens per row that every layer holds.

    Raises
    ------
    ConfigError
        The layers differ: a step was interrupted.
    """
    lengths = {sequence.num_tokens for sequence in runtime.layers.values()}
    if len(lengths) != 1:
        raise ConfigError(f"the layers hold different numbers of tokens: {sorted(lengths)}")
    return lengths.pop()


def _columns(runtime: Runtime, layers: Sequence[int]) -> list[list[Column]]:
    """Return, by row and then by position, the chunks of all layers.

    As many as every layer has: of equally many tokens, one may have the last in a full tail, where
    another has sealed it, in a step that was undone.
    """
    tables = [runtime.layers[index].tables.rows for index in layers]
    num_rows = len(tables[0])
    return [list(zip(*(rows[row] for rows in tables), strict=False)) for row in range(num_rows)]


def _copies(
    engine: Engine, saved: Saved, columns: Mapping[Column, int], number: int, layer: int
) -> Iterator[tuple[ChunkId, ChunkInfo, SlotId]]:
    """Adopt the records of one layer's chunks that have a copy of their own on disk."""
    disk, size = len(engine.tiers) - 1, engine.layout.chunk_tokens
    if engine.disk is None:
        return
    for column, position in columns.items():
        chunk, ref = ChunkId(column[number]), saved.refs[column]
        slot = engine.store.table[chunk].slots.get(disk)
        if slot is not None and engine.disk.is_own(slot):
            path, index = saved.held.place(ref, number)
            [slot] = engine.disk.adopt(path, saved.held.fingerprint, [index], saved.held.sealer)
            yield chunk, ChunkInfo(record_id(ref.key), layer, position * size), slot


def _adopt_layer(
    engine: Engine, held: Held, number: int, layer: int, owners: Mapping[BlockRef, Column]
) -> list[list[ChunkId]]:
    """Return chunks for one layer's records, by position and then by row."""
    assert engine.disk is not None
    size = engine.layout.chunk_tokens
    columns: list[list[ChunkId]] = []
    taken: list[ChunkId] = []
    try:
        for position, refs in enumerate(zip(*held.rows, strict=True)):
            chunks: dict[BlockRef, ChunkId] = {}
            for ref in refs:
                known = chunks.get(ref)
                if known is None and ref in owners:
                    known = ChunkId(owners[ref][number])
                if known is not None and known in engine.store.table:
                    engine.store.table.share([known])
                else:
                    path, index = held.place(ref, number)
                    [slot] = engine.disk.adopt(path, held.fingerprint, [index], held.sealer)
                    info = ChunkInfo(record_id(ref.key), layer, position * size)
                    known = engine.store.adopt(info, slot)
                chunks[ref] = known
                taken.append(known)
            columns.append([chunks[ref] for ref in refs])
    except BaseException:
        engine.store.release(taken)
        raise
    return columns
