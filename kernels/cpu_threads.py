"""Run a compiled kernel on several threads, one share of the heads each.

On torch's own OpenMP threads, if they can be found: after an operation they spin for milliseconds
on the cores that threads of our own would need (a scan on two cores took twice as long).
"""

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

Kernel = Callable[[int, int], None]

_JOB = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run_shares(kernel: Kernel, num_items: int) -> None:
    """Call ``kernel(share, num_shares)`` for every share, on as many threads as torch uses.

    Parameters
    ----------
    kernel : callable
        Handles items ``share``, ``share + num_shares`` and so on; lets go of the GIL.
    num_items : int
        There are no more shares than this.

    Notes
    -----
    Any thread may call.
    """
    num_shares = max(1, min(torch.get_num_threads(), num_items))
    if num_shares == 1:
        kernel(0, 1)
    elif (openmp := _find_openmp()) is not None:
        _run_team(openmp, kernel, num_shares)
    else:
        others = [_executor().submit(kernel, share, num_shares) for share in range(1, num_shares)]
        kernel(0, num_shares)
        for other in others:
            other.result()


def _run_team(openmp: ctypes.CDLL, kernel: Kernel, num_shares: int) -> None:
    shares, errors = iter(range(num_shares)), []

    def job(_: Any) -> None:
        # A team may be smaller than was asked for. The GIL makes taking a share atomic.
        for share in shares:
            try:
                kernel(share, num_shares)
            except BaseException as error:  # it cannot leave through C
                errors.append(error)

    openmp.GOMP_parallel(_JOB(job), None, num_shares, 0)
    if errors:
        raise errors[0]


@functools.cache
def _find_openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that torch has loaded, if it is one of GNU's kind."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    torchs = [path for path in paths if "torch" in path] or sorted(paths)
    if len(torchs) != 1:
        return None
    library = ctypes.CDLL(torchs[0])
    library.GOMP_parallel.argtypes = [_JOB, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@functools.cache
def _executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="offload-kernel")
