"""How single token rows are read: how long to wait for them, and what memory they may have."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a sparse preset says about reading rows.

    Attributes
    ----------
    max_wait_us : float or None
        Longest wait of one layer of a step for rows from the disk, in microseconds. What has not
        arrived stays in the estimate, and is there for the next step. None: wait for everything.
    line_share : float
        From 0 to 1: share of the host's capacity, after buffers, that holds single rows of chunks
        on the disk; the rest holds whole chunks.
    piece_tokens : int or None
        Tokens of a head that are read together, as near as pages of the disk and the length of a
        chunk allow; None: all of a chunk. Fewer are read faster, and hold up others less.
    reads_ahead : bool
        Whether rows are read that will probably be asked for; else only those that are.
    most_in_flight : int or None
        Pieces that are on their way from the disk at a time; None: as many as there are buffers.
    least_disk_share : float or None
        Read of what lies on the disk no more than can be hidden behind compute, as far as measured,
        the best first, but at least such a share, from 0 to 1. None: all that is wanted.
    """

    max_wait_us: float | None = None
    line_share: float = 0.75
    piece_tokens: int | None = 1
    reads_ahead: bool = True
    most_in_flight: int | None = None
    least_disk_share: float | None = None

    @property
    def max_wait_s(self) -> float | None:
        """``max_wait_us`` in seconds."""
        return None if self.max_wait_us is None else self.max_wait_us * 1e-6


@dataclass(frozen=True, slots=True)
class RowMemory:
    """Host memory for reading rows, in bytes.

    Attributes
    ----------
    staging_bytes : int
        Pieces of chunks on their way from the disk; one at least, where there is a disk.
    line_bytes : int
        Rows that were read, and their books.
    """

    staging_bytes: int = 0
    line_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.staging_bytes + self.line_bytes
