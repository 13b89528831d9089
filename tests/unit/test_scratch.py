import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import offload
from offload.errors import ConfigError, StorageError
from offload.tiers.scratch import ScratchDir, default_parent

# Importing the package runs its __init__ and so loads torch and transformers, which takes seconds:
# a package that is only a search path does for one module without either.
_OWNER = """
import sys, types
from pathlib import Path

sys.modules["offload"] = types.ModuleType("offload")
sys.modules["offload"].__path__ = [sys.argv[2]]
from offload.tiers.scratch import ScratchDir

scratch = ScratchDir(Path(sys.argv[1]))
(scratch.path / "segment").write_text("KV")
(scratch.path / "deeper").mkdir()
(scratch.path / "deeper" / "segment").write_text("KV")
print(scratch.path, flush=True)
sys.stdin.read()
"""


def _start_owner(parent: Path) -> tuple["subprocess.Popen[str]", Path]:
    """Start a process that owns a scratch folder until its standard input is closed."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(parent), *offload.__path__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    return owner, Path(owner.stdout.readline().strip())


def _end(owner: "subprocess.Popen[str]", *, kill: bool) -> None:
    if kill:
        owner.send_signal(signal.SIGKILL)
    owner.communicate(timeout=60)


def _folders(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()]


def test_scratch_folder_is_private_and_named_after_the_process(tmp_path: Path) -> None:
    with ScratchDir(tmp_path / "a" / "b") as scratch:
        assert scratch.path.parent == tmp_path / "a" / "b"
        assert scratch.path.name.startswith(f"offload-{os.getpid()}-")
        assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o700
        assert stat.S_IMODE(scratch.path.parent.stat().st_mode) == 0o700


def test_close_removes_the_folder_and_its_content(tmp_path: Path) -> None:
    scratch = ScratchDir(tmp_path)
    (scratch.path / "deeper").mkdir()
    (scratch.path / "deeper" / "file").write_text("KV")
    (scratch.path / "link").symlink_to(tmp_path)
    scratch.close()
    scratch.close()
    assert _folders(tmp_path) == []


def test_close_of_a_folder_that_is_gone_is_quiet(tmp_path: Path) -> None:
    scratch = ScratchDir(tmp_path)
    shutil.rmtree(scratch.path)
    scratch.close()
    assert _folders(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child only calls close
def test_close_in_a_forked_child_keeps_the_folder(tmp_path: Path) -> None:
    with ScratchDir(tmp_path) as scratch:
        child = os.fork()
        if child == 0:
            scratch.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert scratch.path.is_dir()


def test_process_that_ends_removes_its_folder(tmp_path: Path) -> None:
    owner, folder = _start_owner(tmp_path)
    assert (folder / "segment").exists()
    _end(owner, kill=False)
    assert _folders(tmp_path) == []


def test_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    owner, folder = _start_owner(tmp_path)
    _end(owner, kill=True)
    assert (folder / "deeper" / "segment").exists()
    with ScratchDir(tmp_path) as scratch:
        assert _folders(tmp_path) == [scratch.path]


def test_folder_of_a_live_process_is_never_touched(tmp_path: Path) -> None:
    owner, folder = _start_owner(tmp_path)
    with ScratchDir(tmp_path), ScratchDir(tmp_path):
        assert (folder / "deeper" / "segment").exists()
        assert len(_folders(tmp_path)) == 3
    _end(owner, kill=False)


def test_folder_of_a_dead_process_is_removed_although_its_pid_lives_again(tmp_path: Path) -> None:
    stale = tmp_path / f"offload-{os.getpid()}-{0:016x}"
    stale.mkdir()
    (stale / "lock").write_text("")
    with ScratchDir(tmp_path):
        assert not stale.exists()


def test_folder_whose_owner_died_before_locking_it_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / f"offload-1-{0:016x}"
    stale.mkdir()
    with ScratchDir(tmp_path):
        assert not stale.exists()


@pytest.mark.parametrize("name", ["mine", "offload-1", "offload-x-0000000000000000"])
def test_folder_with_another_name_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with ScratchDir(tmp_path):
        assert (tmp_path / name).is_dir()


def test_link_with_a_stale_name_is_not_followed(tmp_path: Path) -> None:
    target, parent = tmp_path / "target", tmp_path / "parent"
    target.mkdir()
    parent.mkdir()
    (target / "precious").write_text("keep")
    (parent / f"offload-1-{0:016x}").symlink_to(target)
    with ScratchDir(parent):
        assert [path.name for path in target.iterdir()] == ["precious"]


def test_stale_folder_that_cannot_be_removed_does_not_stop_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    stale = tmp_path / f"offload-1-{0:016x}"
    (stale / "deeper").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        scratch = ScratchDir(tmp_path)
    assert scratch.path.is_dir()
    assert str(stale) in caplog.text
    scratch.close()
    assert _folders(tmp_path) == [stale]
    ScratchDir(tmp_path).close()
    assert _folders(tmp_path) == []


def test_close_that_cannot_remove_the_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    scratch = ScratchDir(tmp_path)
    (scratch.path / "deeper").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(StorageError, match="cannot remove"):
            scratch.close()
    ScratchDir(tmp_path).close()
    assert _folders(tmp_path) == []


def test_parent_that_cannot_be_written_is_refused_with_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"{tmp_path}/file/x: Not a directory"):
        ScratchDir(tmp_path / "file" / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_parent_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        ScratchDir(tmp_path)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("/somewhere", "/somewhere/offload-kv"), ("relative", "~/.cache/offload-kv")],
)
def test_default_parent_follows_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, cache: str, expected: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert default_parent() == Path(expected).expanduser()
