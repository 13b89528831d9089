"""Wall time of work that a CUDA device may do later."""

import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what a CUDA device has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action: Callable[[], object]) -> float:
    """Run something to its end; return the seconds it took."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started
