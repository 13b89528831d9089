"""Who holds what: KV heads divided among workers, workers among paths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from offload.errors import ConfigError
from offload.types import PAGE_BYTES, ChunkLayout, round_up


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """The share of one worker.

    Attributes
    ----------
    directory : Path
    first_head : int
        The first of its KV heads; they follow each other.
    layout : ChunkLayout
        Of its heads.
    """

    directory: Path
    first_head: int
    layout: ChunkLayout

    @property
    def record_bytes(self) -> int:
        """Bytes of a record: a header page and whole pages of its heads."""
        return PAGE_BYTES + self.layout.slot_bytes

    @property
    def channel_bytes(self) -> int:
        """Most bytes that the channels of a chunk take up.

        Codes, its share of a header, and half as much again for dead ones in the same block.
        """
        layout = self.layout
        codes = layout.num_kv_heads * layout.key_dim * layout.chunk_tokens
        return round_up((round_up(codes) + PAGE_BYTES) * 3 // 2)

    def slot_cost(self, has_channels: bool) -> int:
        """Return the bytes that a chunk takes of the capacity here."""
        return self.record_bytes + (self.channel_bytes if has_channels else 0)

    def part_of(self, buffer: Tensor) -> Tensor:
        """Return the bytes of a chunk, ``uint8``, that are of these heads."""
        size = self.layout.chunk_bytes
        start = self.first_head * (size // self.layout.num_kv_heads)
        return buffer[start : start + size]

    def queries_of(self, query: Tensor, num_kv_heads: int) -> Tensor:
        """Return those of ``[batch, num_heads, key_dim]`` that ask these heads."""
        group = query.shape[1] // num_kv_heads
        first = self.first_head * group
        return query[:, first : first + self.layout.num_kv_heads * group]


def places(
    directories: Sequence[Path], layout: ChunkLayout, workers_per_path: int
) -> list[WorkerPlace]:
    """Divide the heads of a layout among workers, as evenly as they go.

    Raises
    ------
    ConfigError
        There are no directories, or more workers than heads.
    """
    number = len(directories) * workers_per_path
    heads = layout.num_kv_heads
    if not 1 <= number <= heads:
        raise ConfigError(
            f"{len(directories)} paths with {workers_per_path} workers each cannot share the "
            f"{heads} KV heads of a chunk; at least one worker, and a head for each"
        )
    ends = [heads * i // number for i in range(number + 1)]
    return [
        WorkerPlace(
            directories[i // workers_per_path],
            first,
            replace(layout, num_kv_heads=end - first),
        )
        for i, (first, end) in enumerate(pairwise(ends))
    ]
