"""Attention of rows of different lengths in one call of a kernel, where all of it is in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.engine import Engine
from offload.exact import AttentionCall
from offload.handle import Handle
from offload.kernels.dispatch import attend_rows, compiled
from offload.kernels.reference import merge
from offload.runtime import Runtime
from offload.tiers.memory import MemoryTier
from offload.types import Partial

_Key = tuple[object, ...]


@dataclass(slots=True)
class _Places:
    """Addresses of the chunks of one layer of some rows, and what they were made for."""

    key: _Key
    addresses: Tensor | None


class StepAttention:
    """Finds where the chunks of every row lie, and remembers it while nothing moves.

    Used by one thread.
    """

    def __init__(self) -> None:
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
        if not _is_plain(call, engine) or any(row.appended.keys is not None for row in rows):
            return None
        with engine.lock:
            past = self._past(engine, [each for each in runtimes if each is not None], rows)
            if past is None:
                return None
            parts = [self._attend_tails(call, engine, rows)]
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
        self, engine: Engine, runtimes: Sequence[Runtime], rows: Sequence[Handle]
    ) -> Tensor | None:
        """Return addresses ``[num_rows * num_kv_heads, num_chunks]`` of chunks; 0 for none."""
        layer = rows[0].layer
        sequences = [runtime.layers[layer] for runtime in runtimes]
        key = (engine.store.version, *((id(each), each.tables.version) for each in sequences))
        known = self._places.get(layer)
        if known is None or known.key != key:
            chunks = [_addresses(engine, each.tables.rows[0]) for each in sequences]
            known = self._places[layer] = _Places(key, _by_head(engine, chunks))
        return known.addresses

    def _attend_tails(self, call: AttentionCall, engine: Engine, rows: Sequence[Handle]) -> Partial:
        layout = engine.layout
        size = layout.row_dim * layout.dtype.itemsize
        tails = [row.appended.tail for row in rows]
        counts = torch.tensor([tail.shape[2] for tail in tails])
        bases = torch.tensor([tail.data_ptr() for tail in tails])
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


def _addresses(engine: Engine, chunks: Sequence[int]) -> list[int] | None:
    """Return where chunks begin in memory; None if one is not there."""
    pools = [
        (tier.pool.slab.data_ptr(), tier.slot_bytes) if isinstance(tier, MemoryTier) else None
        for tier in engine.tiers
    ]
    table, found = engine.store.table, []
    for chunk in chunks:
        slots = table[chunk].slots  # type: ignore[index]
        level = min(slots, default=-1)
        pool = pools[level] if level >= 0 else None
        if pool is None:
            return None
        found.append(pool[0] + slots[level] * pool[1])
    return found


def _by_head(engine: Engine, rows: Sequence[list[int] | None]) -> Tensor | None:
    layout = engine.layout
    longest = max((len(row) for row in rows if row is not None), default=0)
    table = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        if row is None:
            return None
        table[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    step = layout.chunk_tokens * layout.row_dim * layout.dtype.itemsize
    heads = torch.arange(layout.num_kv_heads)[:, None] * step
    return torch.where(table[:, None] != 0, table[:, None] + heads, 0).flatten(0, 1)
