"""Machine code of kernels that was kept by an earlier version of them."""

import contextlib
import functools
from pathlib import Path
from types import ModuleType


def remove_stale(module: ModuleType) -> None:
    """Remove kept code that is older than any source of the kernels.

    numba compares a kernel with its own file alone, though it has code from others in it, and reads
    what was kept for types that may be gone. Needs numba. Whoever removes what another process has
    just read takes nothing from it.

    Parameters
    ----------
    module : module
        Of compiled kernels, which have not been called.
    """
    for value in vars(module).values():
        path = getattr(getattr(value, "stats", None), "cache_path", None)
        if path is not None:
            _remove_stale(Path(path))
            return


@functools.cache
def _remove_stale(folder: Path) -> None:
    newest = max(source.stat().st_mtime for source in Path(__file__).parent.glob("cpu_*.py"))
    for kept in folder.glob("cpu_*.nb[ic]"):
        with contextlib.suppress(OSError):  # of somebody else's, or gone
            if kept.stat().st_mtime < newest:
                kept.unlink()
