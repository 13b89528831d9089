"""How much host memory a block of code needed at its peak. Knows nothing of device memory."""

import re
import resource
import sys
from pathlib import Path
from typing import Self

import psutil

_PROC = Path("/proc/self")


class PeakMemory:
    """Measures by how much the resident memory of this process grew while a block ran.

    The kernel keeps the peak, so nothing is missed between two looks. Where it refuses to forget an
    earlier peak (it is Linux that can), ``growth_bytes`` may be too large, never too small.

    Use it from one thread; memory of other threads counts too.

    Attributes
    ----------
    growth_bytes : int
        Peak minus what was resident at the start. Zero until the block has ended.
    """

    growth_bytes = 0

    def __enter__(self) -> Self:
        _forget_peak()
        self._before_bytes = int(psutil.Process().memory_info().rss)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.growth_bytes = max(0, _peak_bytes() - self._before_bytes)


def _forget_peak() -> None:
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return  # the peak since the start of the process is then an upper bound


def _peak_bytes() -> int:
    try:
        status = (_PROC / "status").read_text()
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Unlike ru_maxrss, which a process inherits from whoever started it.
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024
