"""Attention under way on workers."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

import torch

from offload.errors import TransferTimeout
from offload.types import Partial


class NearCall:
    """The answers of workers, each to some heads, as they come.

    Parameters
    ----------
    what : str
    parts : sequence of sequence of Future of Partial
        By worker, and then by rows of the batch.
    """

    def __init__(self, what: str, parts: Sequence[Sequence["Future[Partial]"]]) -> None:
        self._what = what
        self._parts = parts

    def done(self) -> bool:
        """Whether all answers are there. Never blocks."""
        return all(future.done() for part in self._parts for future in part)

    def wait(self, timeout_s: float | None = None) -> Partial:
        """Block until all workers have answered, and return what they said.

        Returns
        -------
        Partial
            ``out`` [num_rows, num_heads, value_dim] float32, ``lse`` [num_rows, num_heads].

        Raises
        ------
        TransferTimeout
            Not within ``timeout_s``.
        CorruptChunk, StorageError
            As a worker said; or it died, and so did its successor.
        """
        started = time.monotonic()
        futures = [future for part in self._parts for future in part]
        _, pending = wait(futures, timeout_s)
        if pending:
            raise TransferTimeout(
                f"{self._what}: {len(pending)} of {len(futures)} answers missing after "
                f"{time.monotonic() - started:.1f} s"
            )
        heads = []
        for part in self._parts:
            rows = [future.result() for future in part]
            heads.append(Partial(*(torch.cat(each) for each in zip(*rows, strict=True))))
        return Partial(*(torch.cat(each, 1) for each in zip(*heads, strict=True)))
