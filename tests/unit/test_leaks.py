import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.leaks import no_leaks


def _leave_a_thread(stop: threading.Event) -> Callable[[], object]:
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()

    def undo() -> None:
        stop.set()
        thread.join()

    return undo


def _leave_a_descriptor(_: threading.Event) -> Callable[[], object]:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    return lambda: os.close(descriptor)


def _leave_a_file(_: threading.Event) -> Callable[[], object]:
    descriptor, path = tempfile.mkstemp(prefix="forgotten")
    os.close(descriptor)
    return Path(path).unlink


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (_leave_a_thread, "thread forgotten"),
        (_leave_a_descriptor, f"-> {os.devnull}"),
        (_leave_a_file, "temporary file .*forgotten"),
    ],
)
def test_no_leaks_with_something_left_behind_fails_and_names_it(
    leave: Callable[[threading.Event], Callable[[], object]],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leaks, "_GRACE_S", 0.01)
    clean_up: list[Callable[[], object]] = []
    try:
        with pytest.raises(AssertionError, match=named), no_leaks(tmp_path):
            clean_up.append(leave(threading.Event()))
    finally:
        for undo in clean_up:
            undo()


def test_no_leaks_with_everything_given_back_passes(tmp_path: Path) -> None:
    with no_leaks(tmp_path):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        with tempfile.NamedTemporaryFile():
            pass


@pytest.mark.leaks
def test_leaks_marker_sends_temporary_files_to_the_test_directory(tmp_path: Path) -> None:
    assert Path(tempfile.gettempdir()).parent == tmp_path
