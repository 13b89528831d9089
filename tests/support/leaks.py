"""Fails a test that leaves a thread, an open file or a temporary file behind."""

import contextlib
import gc
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_OPEN_FILES = Path("/proc/self/fd")
_SHARED_THREADS = ("offload-kernel", "tqdm_monitor")
"""Started once in a process, for everybody."""

_GRACE_S = 5.0


@contextlib.contextmanager
def no_leaks(temporary_files: Path) -> Iterator[None]:
    """Compare threads, descriptors and temporary files before and after the body.

    Temporary files are sent to a directory of their own: the shared one also holds the files of
    other processes.

    Parameters
    ----------
    temporary_files : Path
        An existing, empty directory, where ``tempfile`` writes during the body.

    Raises
    ------
    AssertionError
        Something was left behind; the message names each thing.
    """
    threads = set(threading.enumerate())
    descriptors = _open_descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary_files))
        patch.setenv("TMPDIR", str(temporary_files))
        yield
    leaks = [f"thread {name}" for name in _threads_since(threads)]
    leaks += [f"descriptor {opened}" for opened in _descriptors_since(descriptors)]
    leaks += [f"temporary file {path}" for path in sorted(temporary_files.rglob("*"))]
    assert not leaks, "left behind: " + "; ".join(leaks)


def _threads_since(before: set[threading.Thread]) -> list[str]:
    started = {
        thread
        for thread in set(threading.enumerate()) - before
        if not thread.name.startswith(_SHARED_THREADS)
    }
    for thread in started:
        # A thread that was told to stop may still be on its way out.
        thread.join(_GRACE_S)
    return sorted(thread.name for thread in started if thread.is_alive())


def _descriptors_since(before: dict[str, str]) -> list[str]:
    opened = _open_descriptors().items() - before.items()
    if opened:
        # A descriptor closes with its owner, which a reference cycle may keep until a collection;
        # after every test that would take longer than the tests.
        gc.collect()
        opened = _open_descriptors().items() - before.items()
    return sorted(f"{number} -> {target}" for number, target in opened)


def _open_descriptors() -> dict[str, str]:
    if not _OPEN_FILES.is_dir():
        return {}
    found = {}
    for entry in list(_OPEN_FILES.iterdir()):
        # The descriptor that lists the directory is gone by the time it is read.
        with contextlib.suppress(FileNotFoundError):
            found[entry.name] = str(entry.readlink())
    return found
