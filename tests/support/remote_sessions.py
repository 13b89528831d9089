"""Machines that share an object store: each has a root of its own."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from offload.sessions.remote_sessions import RemoteSessions
from offload.tiers.remote_bucket import Bucket
from tests.support.remote import StillClock, folder_bucket
from tests.support.sessions import small_store

GRACE_S = 3600.0


class Machine:
    """A local store, and the sessions that it shares."""

    def __init__(self, folder: Path, bucket: Bucket, name: str, **options: Any) -> None:
        self.clock = StillClock()
        self.store = small_store(folder / name)
        arguments = {"owner": name, "grace_s": GRACE_S, "num_threads": 3, "clock": self.clock}
        self.remote = RemoteSessions(bucket, **{**arguments, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remote.close()
        self.store.close()


NewMachine = Callable[[str], Machine]


@contextmanager
def machines(folder: Path) -> Iterator[NewMachine]:
    """Make machines that share the folder ``bucket``, for as long as the body runs."""
    folder_bucket(folder / "bucket").list("nothing")  # makes the folder
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(
            Machine(folder, folder_bucket(folder / "bucket"), name)
        )


def objects_in(folder: Path, prefix: str = "") -> list[str]:
    """Return the names of the objects of a bucket that is a folder."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if name.startswith(prefix))


def age(folder: Path, seconds: float, prefix: str = "") -> None:
    """Make the objects of a bucket that is a folder older."""
    for name in objects_in(folder, prefix):
        modified_at = (folder / name).stat().st_mtime - seconds
        os.utime(folder / name, (modified_at, modified_at))
