"""Folders of daemons that share a machine: each has one, and nobody has two."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offload.daemon.slots import claim_slot
from offload.errors import ConfigError

HOLDER = """
import sys, pathlib
from offload.daemon.slots import claim_slot
slot = claim_slot(pathlib.Path(sys.argv[1]), 1, 0.0)
print(slot.number, flush=True)
sys.stdin.read()
"""


def test_slots_are_given_in_order_and_are_private(tmp_path: Path) -> None:
    slots = [claim_slot(tmp_path / "data", 3, 0.0) for _ in range(3)]
    assert [slot.number for slot in slots] == [0, 1, 2]
    assert [slot.path.name for slot in slots] == ["replica-0", "replica-1", "replica-2"]
    assert {slot.path.stat().st_mode & 0o777 for slot in slots} == {0o700}
    for slot in slots:
        slot.release()


def test_slot_that_was_released_is_the_next_to_be_given(tmp_path: Path) -> None:
    first, second = (claim_slot(tmp_path, 2, 0.0) for _ in range(2))
    first.release()
    first.release()
    again = claim_slot(tmp_path, 2, 0.0)
    assert again.number == 0
    for slot in (second, again):
        slot.release()


def test_slot_is_waited_for_as_long_as_another_leaves(tmp_path: Path) -> None:
    old = claim_slot(tmp_path, 1, 0.0)
    leaving = threading.Timer(0.05, old.release)
    leaving.start()
    new = claim_slot(tmp_path, 1, 30.0)
    leaving.join()
    assert new.number == 0
    new.release()


def test_slot_beyond_is_given_and_told_where_nobody_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slots = [claim_slot(tmp_path, 1, 0.0) for _ in range(4)]
    assert [slot.number for slot in slots] == [0, 1, 2, 3]
    assert "all 1 slots" in caplog.text
    for slot in slots:
        slot.release()


def test_slot_of_a_killed_process_is_free_with_what_is_in_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"0\n"
        (tmp_path / "replica-0" / "saved").touch()
        other = claim_slot(tmp_path, 1, 0.0)
        assert other.number == 1
        process.kill()
        process.wait()
    heir = claim_slot(tmp_path, 1, 0.0)
    assert heir.number == 0
    assert (heir.path / "saved").exists()
    for slot in (other, heir):
        slot.release()


def test_lock_is_not_inherited_by_programs_that_are_started(tmp_path: Path) -> None:
    slot = claim_slot(tmp_path, 1, 0.0)
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        slot.release()
        with (tmp_path / "replica-0" / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()


def test_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(ConfigError, match=r"cannot use .*replica-0"):
        claim_slot(tmp_path / "data", 1, 0.0)


def test_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "replica-0"
    folder.mkdir()
    os.symlink(tmp_path / "elsewhere", folder / ".lock")
    with pytest.raises(ConfigError, match="cannot use"):
        claim_slot(tmp_path, 1, 0.0)
    assert not (tmp_path / "elsewhere").exists()
