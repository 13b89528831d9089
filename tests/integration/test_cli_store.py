"""The root that ``offload sessions`` works on: named, missing, or none at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli import main
from tests.support.sessions import make_content, save, small_store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with small_store(tmp_path / "root") as store:
        save(store, "a", make_content(1, 1))
    return tmp_path / "root"


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["info", "a"],
        ["pin", "a"],
        ["unpin", "a"],
        ["ttl", "a", "1h"],
        ["rename", "a", "b"],
        ["delete", "a"],
        ["verify", "a"],
        ["export", "a", "file"],
        ["usage"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_sessions_of_a_missing_root_say_so_and_make_none(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "nowhere"
    assert main(["sessions", *arguments, "--root", str(root)]) == 2
    expected = f"offload: {root} does not exist; name the root of a session store\n"
    assert capsys.readouterr().err == expected
    assert not root.exists()


def test_sessions_of_a_folder_that_is_no_root_leave_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    before = folder.stat()  # but for the time of the last look into it
    assert main(["sessions", "list", "--root", str(folder)]) == 2
    assert "is none; name the root of a session store" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    after = folder.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_sessions_without_a_root_use_the_cache_folder_of_the_user(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "offload-kv").mkdir(parents=True)
    root.rename(tmp_path / "cache" / "offload-kv" / "sessions")
    assert main(["sessions", "list", "--json"]) == 0
    names = [each["name"] for each in json.loads(capsys.readouterr().out)["sessions"]]
    assert names == ["a"]


def test_sessions_do_not_wait_for_transformers_to_be_imported(root: Path) -> None:
    code = (
        "import sys, offload.cli as c; c.main(sys.argv[1:]); print('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "sessions", "list", "--json", "--root", str(root)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.endswith("}\nFalse\n")
