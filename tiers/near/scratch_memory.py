"""Page-aligned memory that each thread keeps for the next time."""

import threading

from torch import Tensor

from offload.tiers.pool import page_aligned

_local = threading.local()


def thread_memory(purpose: str, num_bytes: int) -> Tensor:
    """Return ``uint8`` memory of at least so many bytes, the same as last time if it suffices.

    Parameters
    ----------
    purpose : str
        What is in it must not be needed any more when the thread asks for this again.
    num_bytes : int
    """
    kept: dict[str, Tensor] = _local.__dict__.setdefault("kept", {})
    if purpose not in kept or kept[purpose].numel() < num_bytes:
        kept[purpose] = page_aligned(num_bytes + num_bytes // 4)
    return kept[purpose]
