"""Processes held by descriptors, the launcher that starts them, and one link without a tier."""

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from offload.errors import ClosedError, StorageError
from offload.tiers.near.launching import Launcher, WorkerProcess
from offload.tiers.near.link import WorkerLink
from offload.tiers.near.messages import Adopt, Ask, Body
from offload.tiers.near.shared_memory import SharedMemory
from tests.support.disk import WAIT_S
from tests.support.near import held_launcher, kill, make_near, wait_gone


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@pytest.fixture
def link(tmp_path: Path) -> Iterator[WorkerLink]:
    with closing(make_near(tmp_path)) as disk:
        yield disk.members[0].link


def test_process_is_ended_by_descriptor_and_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    process = WorkerProcess(child.pid)
    process.kill()
    process.close()
    assert child.wait(WAIT_S) == -signal.SIGKILL
    process.close()
    process.kill()
    assert child.stdin is not None
    child.stdin.close()


def test_process_can_be_waited_for_where_a_thousand_files_are_open(link: WorkerLink) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with ExitStack() as stack, open(os.devnull) as null:
            for _ in range(1100):
                stack.callback(os.close, os.dup(null.fileno()))
            process = WorkerProcess(link.pid)
            assert process._fd > 1024
            process.kill()
            process.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert link.ask("disk: counters", lambda _: Ask()).result(WAIT_S)["attended_rows"] == 0


def test_launcher_is_shared_by_all_who_acquire_it() -> None:
    first = Launcher.acquire()
    try:
        assert Launcher.acquire() is first
        Launcher.release()
        assert first._process.poll() is None
    finally:
        Launcher.release()


def test_worker_that_cannot_be_started_by_two_launchers_is_a_storage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A launcher of its own; what runs in place of Python ends at once.
    monkeypatch.setattr("sys.executable", "/bin/false")
    launcher, memory = Launcher(), SharedMemory(4096)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(StorageError, match="cannot start a storage worker"):
        launcher.start(theirs.fileno(), memory.fd)
    launcher._end()
    memory.close()


def test_executable_that_is_not_there_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(StorageError, match="cannot start /nowhere/python"):
        Launcher()


def test_request_is_made_anew_for_each_process_and_told_what_that_one_knows(
    link: WorkerLink,
) -> None:
    seen: list[tuple[int, dict[int, object]]] = []

    def make(known: dict[int, object]) -> Body:
        seen.append((link.pid, dict(known)))
        known[len(seen)] = "told"
        if len(seen) == 2:
            kill(link)
        return Ask()

    for _ in range(2):
        link.ask("disk: counters", make).result(WAIT_S)
    first, again, anew = seen
    assert again == (first[0], {1: "told"})
    assert first[1] == anew[1] == {}
    assert anew[0] != first[0]
    assert link.num_restarts == 1


def test_two_deaths_over_one_request_are_a_storage_error_that_names_it(link: WorkerLink) -> None:
    pids: list[int] = []

    def make(_: dict[int, object]) -> Body:
        pids.append(link.pid)
        kill(link)
        return Ask()

    with pytest.raises(StorageError, match=r"poison: storage worker 0 .* died, 2 times"):
        link.ask("poison", make).result(WAIT_S)
    wait_gone(pids)
    assert len(pids) == 2
    assert link.ask("disk: counters", lambda _: Ask()).result(WAIT_S)
    assert link.num_restarts == 2


def test_link_that_cannot_restart_its_worker_fails_what_waits_and_refuses_the_rest(
    link: WorkerLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> WorkerProcess:
        raise StorageError("no more processes")

    def make(_: dict[int, object]) -> Body:
        kill(link)
        return Ask()

    monkeypatch.setattr(link._launcher, "start", refuse)
    with pytest.raises(StorageError, match=r"counters: cannot restart .*: no more processes"):
        link.ask("disk: counters", make).result(WAIT_S)
    with pytest.raises((ClosedError, StorageError)):
        link.ask("disk: counters", lambda _: Ask()).result(WAIT_S)


def test_closing_a_link_ends_its_worker_and_fails_what_waits(tmp_path: Path) -> None:
    disk = make_near(tmp_path)
    link, pid = disk.members[0].link, disk.members[0].link.pid
    os.kill(pid, signal.SIGSTOP)
    asked = link.ask("disk: counters", lambda _: Ask())
    disk.close()
    wait_gone([pid])
    with pytest.raises(ClosedError, match="disk: counters: the disk tier was closed"):
        asked.result(0)
    link.close()


def test_worker_told_of_records_that_are_not_there_serves_all_the_same(link: WorkerLink) -> None:
    adopted = link.ask("disk: adopt", lambda _: Adopt([], []))
    assert adopted.result(WAIT_S) is None


def test_shared_memory_has_no_name_and_goes_with_its_last_view() -> None:
    memory = SharedMemory(5000)
    inode = f" {os.fstat(memory.fd).st_ino} "
    assert os.readlink(f"/proc/self/fd/{memory.fd}").startswith("/memfd:")
    other = SharedMemory(memory.num_bytes, os.dup(memory.fd))
    memory.bytes[4999] = 7
    assert int(other.bytes[4999]) == 7
    view = other.bytes[:10].numpy()
    for each in (memory, other):
        each.close()
        each.close()
    view[:] = 1
    assert inode in Path("/proc/self/maps").read_text()
    del view
    assert inode not in Path("/proc/self/maps").read_text()
