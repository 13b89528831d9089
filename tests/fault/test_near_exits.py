"""However a process with workers ends, they end too, and their launcher, and nothing is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from offload.tiers.near.launching import Launcher
from tests.support.disk import WAIT_S
from tests.support.near import (
    check_attends,
    check_reads,
    fill,
    make_near,
    num_restarts,
    wait_gone,
)

CHECKOUT = Path(__file__).parents[2]


class Owner:
    """A process that has workers, and what it says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def hear(self) -> dict[str, Any]:
        """Return the next thing that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended: {self.process.wait(WAIT_S)}"
        said: dict[str, Any] = json.loads(line)
        return said

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextmanager
def started(folder: Path, ending: str) -> Iterator[Owner]:
    """Start ``tests.support.near_owner`` in a process group of its own, and end that."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.near_owner", str(folder), ending],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        start_new_session=True,
    )
    with process:
        try:
            yield Owner(process)
        finally:
            process.kill()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_closed_tier_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    before = children()
    disk = make_near(tmp_path / "disk", num_paths=2, has_channels=True, block_tokens=64)
    held = fill(disk)
    check_attends(disk, held)
    assert len(children() - before) >= 1
    launcher = Launcher._shared
    assert launcher is not None
    pids = [member.link.pid for member in disk.members]
    maps = Path(f"/proc/{pids[0]}/maps").read_text()
    assert "/memfd:offload-near" in maps  # which goes with the last process that has it
    assert "/dev/shm" not in maps
    disk.close()
    disk.close()
    wait_gone([*pids, launcher._process.pid])
    assert children() <= before
    assert Launcher._shared is None
    assert all(path.name.startswith("path-") for path in (tmp_path / "disk").rglob("*"))


def test_launcher_that_is_killed_takes_its_workers_along_and_all_come_back(
    tmp_path: Path,
) -> None:
    with closing(make_near(tmp_path, num_paths=2)) as disk:
        held = fill(disk)
        launcher = Launcher._shared
        assert launcher is not None
        pids = [member.link.pid for member in disk.members]
        os.kill(launcher._process.pid, signal.SIGKILL)
        wait_gone(pids)
        check_attends(disk, held)
        check_reads(disk, held, 1)
        assert num_restarts(disk) == [1, 1]
        assert Launcher._shared is launcher
    wait_gone([launcher._process.pid])


def test_interrupt_and_exit_of_a_fork_end_no_worker_and_exit_amid_of_a_call_ends_all(
    tmp_path: Path,
) -> None:
    with started(tmp_path, "interrupt") as owner:
        pids = owner.hear()
        os.killpg(owner.process.pid, signal.SIGINT)
        assert owner.hear() == {"restarts": [0, 0]}
        assert owner.hear() == {"done": False}
        assert owner.process.wait(WAIT_S) == 3
        wait_gone([pids["launcher"], *pids["workers"]])
        assert owner.process.stderr is not None
        assert owner.process.stderr.read() == ""


def test_killed_process_takes_its_workers_along_even_if_a_fork_of_it_lives_on(
    tmp_path: Path,
) -> None:
    with started(tmp_path, "fork") as owner:
        fork, pids = sorted((owner.hear(), owner.hear()), key=len)
        owner.process.kill()
        wait_gone([pids["launcher"], *pids["workers"]])
        os.kill(fork["fork"], 0)
        owner.end_input()
        wait_gone([fork["fork"]])


def test_exit_without_closing_ends_the_workers_and_removes_what_they_are_writing(
    tmp_path: Path,
) -> None:
    with started(tmp_path, "forget") as owner:
        pids = owner.hear()
        assert owner.hear() == {"done": False}
        assert owner.process.wait(WAIT_S) == 0
        wait_gone([pids["launcher"], *pids["workers"]])
        assert not any(path.name.startswith("offload-") for path in tmp_path.iterdir())
        assert owner.process.stderr is not None
        assert owner.process.stderr.read() == ""


@pytest.mark.parametrize("num_paths", [1, 2])
def test_tier_that_cannot_start_leaves_no_process_and_no_file(
    tmp_path: Path, num_paths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(OSError, match="cannot start a storage worker"):
        make_near(tmp_path / "disk", num_paths=num_paths)
    assert children() == before
    assert Launcher._shared is None
    assert all(path.name.startswith("path-") for path in (tmp_path / "disk").rglob("*"))
