"""Run a compiled kernel on several threads, one share of the heads each."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def run_shares(kernel: Callable[[int, int], None], num_items: int) -> None:
    """Call ``kernel(share, num_shares)`` for every share, on as many threads as torch uses.

    Parameters
    ----------
    kernel : callable
        Handles items ``share``, ``share + num_shares`` and so on; lets go of the GIL.
    num_items : int
        There are no more shares than this.

    Notes
    -----
    Any thread may call. Callers share the threads, which never wait for each other.
    """
    num_shares = max(1, min(torch.get_num_threads(), num_items))
    others = [_executor().submit(kernel, share, num_shares) for share in range(1, num_shares)]
    kernel(0, num_shares)
    for other in others:
        other.result()


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="offload-kernel")
