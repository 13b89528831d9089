"""What makes a small file system full, or read-only, while somebody uses it."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.types import PAGE_BYTES


class Ballast:
    """A file that takes up what is free.

    Parameters
    ----------
    directory : Path
        On the file system to be filled.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "ballast"

    def leave(self, num_pages: int) -> None:
        """Fill the file system, but for so many pages."""
        found = os.statvfs(self._path.parent)
        size = found.f_bavail * found.f_frsize - num_pages * PAGE_BYTES
        with self._path.open("ab") as file:
            os.posix_fallocate(file.fileno(), file.tell(), max(PAGE_BYTES, size))

    def drop(self) -> None:
        """Give everything back."""
        self._path.unlink(missing_ok=True)


@contextmanager
def read_only(mounted: Path) -> Iterator[None]:
    """Forbid writing to a mounted file system."""
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(mounted)], check=True)
