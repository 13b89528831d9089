"""Attention of rows of different lengths in one call of a kernel, where all of it is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor

from offload.daemon.work.chunk_addresses import ChunkAddresses
from offload.engine import Engine
from offload.exact import AttentionCall
from offload.handle import Handle
from offload.kernels.dispatch import attend_rows, compiled
from offload.kernels.reference import merge
from offload.sequence import LayerSequence
from offload.types import Partial


@dataclass(frozen=True, slots=True)
class _Places:
    """Addresses of the chunks of one layer of some rows, and what they were made for."""

    sequences: Sequence[LayerSequence]
    versions: Sequence[int]
    addresses: Tensor

    def are_of(self, sequences: Sequence[LayerSequence], versions: Sequence[int]) -> bool:
        """Whether nothing has changed since."""
        return (
            self.versions == versions
            and len(self.sequences) == len(sequences)
            and all(map(is_, self.sequences, sequences))
        )


class StepAttention:
    """Finds where the chunks of every row lie, and remembers it while nothing moves.

    Used by one thread.
    """

    def __init__(self) -> None:
        self._chunks: ChunkAddresses | None = None
        self._places: dict[int, _Places] = {}

    def attend(self, call: AttentionCall, rows: Sequence[Handle]) -> Tensor | None:
        """Attend with one query per row.

        Parameters
        ----------
        call : AttentionCall
            Of all rows.
        rows : sequence of Handle
            Of one layer; their cores are forks of one.

        Returns
        -------
        Tensor, shape (num_rows, 1, num_heads, value_dim), or None
            None: rows have to be attended one by one, because something is not in memory, or the
            kernel cannot do what is asked.
        """
        runtimes = [row.core.runtime for row in rows]
        first = runtimes[0]
        assert first is not None
        engine = first.engine
        if not _is_plain(call, engine):
            return None
        layer = rows[0].layer
        sequences = [each.layers[layer] for each in runtimes if each is not None]
        with engine.lock:
            past = self._past(engine, sequences, layer)
            if past is None:
                return None
            parts = [self._attend_tails(call, engine, sequences)]
            if past.shape[1]:
                tokens = engine.layout.chunk_tokens
                parts.append(
                    attend_rows(
                        _scaled(call, engine),
                        past,
                        engine.layout.value_dim,
                        engine.layout.dtype,
                        tokens,
                    )
                )
        merged = merge(parts) if len(parts) > 1 else parts[0]
        return merged.out.to(call.query.dtype).view(len(rows), 1, call.query.shape[1], -1)

    def _past(
        self, engine: Engine, sequences: Sequence[LayerSequence], layer: int
    ) -> Tensor | None:
        """Return addresses ``[num_rows * num_kv_heads, num_chunks]`` of chunks; 0 for none.

        Those are among them that this very step has filled: who fills one must not make everybody
        else be attended row by row.
        """
        if self._chunks is None or self._chunks.engine is not engine:
            self._chunks, self._places = ChunkAddresses(engine), {}
        versions = [self._chunks.version, *(each.tables.version for each in sequences)]
        known = self._places.get(layer)
        if known is None or not known.are_of(sequences, versions):
            found = [self._chunks.find(each.tables.rows[0]) for each in sequences]
            chunks = [each for each in found if each is not None]
            if len(chunks) < len(found):
                return None
            known = _Places(sequences, versions, _by_head(engine, chunks))
            self._places[layer] = known
        return known.addresses

    def _attend_tails(
        self, call: AttentionCall, engine: Engine, sequences: Sequence[LayerSequence]
    ) -> Partial:
        layout = engine.layout
        size = layout.row_dim * layout.dtype.itemsize
        counts = torch.tensor([each.tail_tokens for each in sequences])
        bases = torch.tensor([each.tail.data_ptr() for each in sequences])
        tokens = torch.arange(int(counts.max()))
        places = bases[:, None] + tokens * size
        places = places.masked_fill_(tokens >= counts[:, None], 0)[:, None]
        heads = torch.arange(layout.num_kv_heads)[:, None] * (layout.chunk_tokens * size)
        addresses = torch.where(places != 0, places + heads, 0).flatten(0, 1)
        return attend_rows(_scaled(call, engine), addresses, layout.value_dim, layout.dtype)


def _is_plain(call: AttentionCall, engine: Engine) -> bool:
    """Whether a call reads all keys of all rows, and there is a kernel for that."""
    fast, layout = compiled("cpu_rows"), engine.layout
    return (
        fast is not None
        and engine.device.type == "cpu"
        and engine.retrieval is None
        and engine.in_place is None
        and call.query.shape[2] == 1
        and all(each is None for each in (call.mask, call.softcap, call.window, call.sinks))
        and call.expand is None
        and bool(fast.supports(layout.dtype, layout.key_dim, layout.value_dim))
    )


def _scaled(call: AttentionCall, engine: Engine) -> Tensor:
    """Return the queries ``[num_rows * num_kv_heads, group, key_dim]``, scaled, float32."""
    num_heads = call.query.shape[0] * engine.layout.num_kv_heads
    return (call.query.float() * call.scale).reshape(num_heads, -1, call.query.shape[-1])


def _by_head(engine: Engine, rows: Sequence[list[int]]) -> Tensor:
    layout = engine.layout
    longest = max(map(len, rows), default=0)
    table = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    step = layout.chunk_tokens * layout.row_dim * layout.dtype.itemsize
    heads = torch.arange(layout.num_kv_heads)[:, None] * step
    return torch.where(table[:, None] != 0, table[:, None] + heads, 0).flatten(0, 1)
