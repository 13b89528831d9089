"""The host tier that holds codes: chunks encoded at a fixed rate, attended without decoding them.

Not for codecs whose units become as many bytes as they like, which slots cannot hold.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.dispatch import compiled
from offload.tiers.codec_fixed import UNIT_ALIGNMENT, slot_bytes_of, unit_of
from offload.tiers.codecs import Codec
from offload.tiers.kept_codes import KeptCodes
from offload.tiers.pooled import PooledTier
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout, Partial, SlotId, round_up

_BATCH_UNITS = 256
"""Decoded at a time for single rows of them: 8 MiB with 64 tokens of 512 bytes."""

Ints = NDArray[np.int64]


class CodedTier(PooledTier):
    """A tier in host memory whose slots are encoded: the same capacity holds more chunks.

    What is read is what the codec decodes, in the layout's dtype. Writes encode and reads decode,
    on the caller's thread; any number of threads may read at a time. A slot has a unit of 64 tokens
    (of all tokens of a chunk that is no multiple of that) per KV head after the other, each
    beginning at a cache line, and is as large as its codes, not a multiple of the page size.

    Parameters
    ----------
    name : str
    capacity_bytes : int
        Of codes.
    layout : ChunkLayout
        Of the chunks that are written and read.
    codec : Codec
        One of ``codec_fixed``.
    num_streams : int
        Streams that share the slots evenly, see ``SlotPool``.
    kept : KeptCodes, optional
        What remembers codes of chunks that go to the disk.

    Raises
    ------
    ConfigError
        The codec does not encode the layout's dtype, or makes chunks of it no smaller.
    """

    def __init__(
        self,
        name: str,
        *,
        capacity_bytes: int,
        layout: ChunkLayout,
        codec: Codec,
        num_streams: int = 1,
        kept: KeptCodes | None = None,
    ) -> None:
        self.codec = codec
        self.unit = unit_of(layout)
        self._unit_bytes = codec.max_bytes(self.unit)
        self._stride = round_up(self._unit_bytes, UNIT_ALIGNMENT)
        self._units_per_head = layout.chunk_tokens // self.unit.num_tokens
        self._num_units = layout.num_kv_heads * self._units_per_head
        super().__init__(
            name,
            capacity_bytes=capacity_bytes,
            layout=layout,
            slot_bytes=slot_bytes_of(codec, layout),
            device=torch.device("cpu"),
            num_streams=num_streams,
        )
        self._kept = kept

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Decode slots into buffers, before this returns."""
        for slot, target in zip(slots, out, strict=True):
            if target.device.type == "cpu":
                self._decode(self._units([slot]), target[: self.layout.chunk_bytes])
            else:
                chunk = torch.empty(self.layout.chunk_bytes, dtype=torch.uint8)
                self._decode(self._units([slot]), chunk)
                target[: self.layout.chunk_bytes].copy_(chunk)
        return CompletedTransfer(len(slots) * self.slot_bytes)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Encode buffers into slots, before this returns."""
        for slot, source in zip(slots, src, strict=True):
            rows = source[: self.layout.chunk_bytes].cpu().view(self.layout.dtype)
            payloads = self.codec.encode(rows.view(-1, *self.unit.shape), self.unit)
            units = self._units([slot])
            for own, payload in zip(units, payloads, strict=True):
                own[:] = np.frombuffer(payload, np.uint8)
        return CompletedTransfer(len(slots) * self.slot_bytes)

    def copy(self, source: SlotId, target: SlotId) -> None:
        """Copy the codes of one slot to another."""
        self.pool.slab[target].copy_(self.pool.slab[source])

    def hand_over(self, slot: SlotId, info: ChunkInfo, out: Tensor) -> None:
        """Decode a slot into a buffer from which the disk will be written.

        If that is to encode the chunk as it is encoded here, it gets the same bytes.
        """
        if self._kept is not None:
            payloads = [own.tobytes() for own in self._units([slot])]
            self._kept.keep(info, self.codec, self.unit, payloads)
        self.read([slot], [info], [out])

    def decoded(self, slots: Ints) -> Tensor:
        """Return chunks, ``[*slots.shape, *layout.shape]``, decoded into memory of their own."""
        out = torch.empty(*slots.shape, *self.layout.shape, dtype=self.layout.dtype)
        self._decode(self._units(slots.ravel().tolist()), out.view(-1).view(torch.uint8))
        return out

    def read_rows(self, slots: Ints, lines: Ints) -> NDArray[np.uint8]:
        """Decode single rows, and no more than the units that they are in.

        Parameters
        ----------
        slots, lines : ndarray, int64 [n]
            Slot, and head * chunk_tokens + token in it.

        Returns
        -------
        ndarray, uint8 [n, row_bytes]
        """
        tokens, row_bytes = self.unit.num_tokens, self.unit.num_bytes // self.unit.num_tokens
        rows = np.empty((len(slots), row_bytes), np.uint8)
        names, which = np.unique(slots * self._num_units + lines // tokens, return_inverse=True)
        for start in range(0, len(names), _BATCH_UNITS):
            some = names[start : start + _BATCH_UNITS]
            out = torch.empty(len(some) * self.unit.num_bytes, dtype=torch.uint8)
            self._decode([self._unit(*divmod(name, self._num_units)) for name in some], out)
            mine = (which >= start) & (which < start + len(some))
            found = out.numpy().reshape(len(some), tokens, row_bytes)
            rows[mine] = found[which[mine] - start, lines[mine] % tokens]
        return rows

    def attend(self, query: Tensor, slots: Ints, scale: float) -> Partial | None:
        """Attend to chunks where they are, without decoding them into memory.

        Parameters
        ----------
        query : Tensor, shape (batch, num_heads, num_queries, key_dim)
            On the CPU.
        slots : ndarray, int64 [batch, num_chunks]
            All of whose tokens every query sees.
        scale : float
            Multiplies the scores.

        Returns
        -------
        Partial or None
            None: there is no kernel for this many queries, these widths or what is in the chunks;
            ``decoded`` has to be attended.
        """
        fast, layout = compiled("cpu_coded"), self.layout
        batch, num_heads, num_queries, key_dim = query.shape
        num_rows = num_heads // layout.num_kv_heads * num_queries
        if fast is None or not fast.supports(
            self.codec.number, layout.key_dim, layout.value_dim, num_rows
        ):
            return None
        heads = torch.arange(layout.num_kv_heads)[:, None, None]
        units = heads * self._units_per_head + torch.arange(self._units_per_head)
        first = torch.from_numpy(slots)[:, None, :, None] * self.slot_bytes
        places = (first + units * self._stride).flatten(2).flatten(0, 1)
        part: Partial | None = fast.attend_codes(
            (query.float() * scale).reshape(batch * layout.num_kv_heads, -1, key_dim),
            self.pool.slab.view(-1),
            places,
            unit_bytes=self._unit_bytes,
            unit_tokens=self.unit.num_tokens,
            value_dim=layout.value_dim,
            codec=self.codec.number,
        )
        if part is None:
            return None
        shape = query.shape[:3]
        return Partial(part.out.view(*shape, -1), part.lse.view(shape))

    def _unit(self, slot: int, number: int) -> NDArray[np.uint8]:
        """View one payload."""
        start = number * self._stride
        own: NDArray[np.uint8] = self.pool.slab[slot, start : start + self._unit_bytes].numpy()
        return own

    def _units(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """View the payloads of slots, one after the other."""
        slab = self.pool.slab.numpy()
        return [
            slab[slot, start : start + self._unit_bytes]
            for slot in slots
            for start in range(0, self.slot_bytes, self._stride)
        ]

    def _decode(self, units: Sequence[NDArray[np.uint8]], out: Tensor) -> None:
        """Fill the bytes of as many units."""
        rows = out.view(self.layout.dtype).view(-1, *self.unit.shape)
        self.codec.decode([own.data for own in units], self.unit, rows)
