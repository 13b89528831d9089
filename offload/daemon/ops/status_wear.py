"""How much the disk was written to today, over restarts."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from offload.errors import StorageError

_DAY_S: Final = 86_400


class DiskWear:
    """Counts bytes written since midnight, UTC. Any one thread at a time.

    Parameters
    ----------
    path : Path
        Where ``save`` keeps the count.
    now : callable
        Seconds since 1970.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now = now
        self._seen_bytes = 0
        self._day, self._today_bytes = _read(path)

    def update(self, total_bytes: int) -> int:
        """Count what was written since the last call, and return the bytes of today.

        Parameters
        ----------
        total_bytes : int
            Written since the process started.
        """
        now = self._now()
        if int(now // _DAY_S) != self._day:
            self._day, self._today_bytes = int(now // _DAY_S), 0
        self._today_bytes += max(0, total_bytes - self._seen_bytes)
        self._seen_bytes = max(self._seen_bytes, total_bytes)
        return self._today_bytes

    def save(self) -> None:
        """Keep the count, for the next process.

        Raises
        ------
        StorageError
            The disk refused.
        """
        content = json.dumps({"day": self._day, "bytes": self._today_bytes}).encode()
        temporary = self._path.with_suffix(".tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(self._path)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error


def _read(path: Path) -> tuple[int, int]:
    """Return the day and its bytes; a count that is missing or damaged starts again."""
    try:
        kept = json.loads(path.read_text())
        return int(kept["day"]), int(kept["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
