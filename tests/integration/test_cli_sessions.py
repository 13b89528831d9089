"""``offload sessions`` on real stores, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.config import format_size
from tests.support.sessions import (
    TAIL_TOKENS,
    expected_payloads,
    make_content,
    make_token_ids,
    read_back,
    save,
    small_store,
)

_TOKENS = make_token_ids(4, seed=1)
_SHORT = 2 * 16 + TAIL_TOKENS
_LONG = 4 * 16 + TAIL_TOKENS

Run = Callable[..., int]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with two sessions, one of which is the beginning of the other."""
    with small_store(tmp_path / "root") as store:
        save(store, "short", make_content(2, 1, token_ids=_TOKENS))
        save(store, "long", make_content(4, 1, token_ids=_TOKENS))
    return tmp_path / "root"


@pytest.fixture
def sessions(root: Path) -> Run:
    """Run ``offload sessions`` on the root; tables unless told otherwise."""
    return lambda *arguments: main(["sessions", *map(str, arguments), "--root", str(root)])


@pytest.fixture
def ask(sessions: Run, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command that succeeds, and return what it prints as JSON."""

    def run(*arguments: object) -> Any:
        capsys.readouterr()
        assert sessions(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return run


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what was printed, without what aligns it."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def segment_file(root: Path, name: str) -> Path:
    return root / "segments" / name[:2] / f"{name}.kvseg"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_list_shows_a_row_for_every_session(
    sessions: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_store(root) as store:
        info = store.info("long")
    size, own = format_size(info.num_bytes), format_size(info.own_bytes)
    assert sessions("list") == 0
    head, _, long, short = rows(capsys)
    assert head == "name tokens rows size own created used expires flags"
    assert long.startswith(f"long {_LONG} 1 {size} {own} ")
    assert short.startswith(f"short {_SHORT} 1 ")
    assert short.endswith("s ago never")


def test_list_json_holds_every_field_of_every_session(ask: Callable[..., Any], root: Path) -> None:
    with small_store(root) as store:
        infos = store.list()
    data = ask("list")
    assert data["root"] == str(root)
    assert [each["name"] for each in data["sessions"]] == ["long", "short"]
    for info, found in zip(infos, data["sessions"], strict=True):
        assert found == {name: getattr(info, name) for name in info.__slots__}


def test_list_of_a_root_without_sessions_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_store(tmp_path / "empty").close()
    assert main(["sessions", "list", "--root", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == f"no sessions in {tmp_path / 'empty'}\n"


def test_list_flags_what_is_pinned_open_or_damaged(
    sessions: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("pin", "short") == 0
    with small_store(root) as store:
        [segment] = store.open("short")[0].segments
        flip(segment_file(root, segment), 5000)
        assert not store.fsck(repair=True).is_clean
        capsys.readouterr()
        assert sessions("list") == 0
    assert rows(capsys)[-1].endswith("never damaged pinned open")


def test_info_shows_what_the_catalog_and_the_file_say(
    sessions: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("info", "short") == 0
    found = rows(capsys)
    with small_store(root) as store:
        file, info = store.describe("short"), store.info("short")
    size, own = format_size(info.num_bytes), format_size(info.own_bytes)
    [segment] = file.segments
    for row in (
        "name short",
        f"identity {file.identity}",
        f"tokens {_SHORT} in each row",
        "token ids kept",
        "chunks 6 of 16 tokens, all layers together",
        f"size {size}, {own} only for it",
        "expires never",
        "layers 0–2",
        "layout 2 KV heads, 32 + 32 wide, float32",
        "weights w",
        f"{segment} │ 3 │ 2 │ 2",
    ):
        assert row in found


def test_info_json_holds_namespace_layout_layers_and_segments(
    ask: Callable[..., Any], root: Path
) -> None:
    with small_store(root) as store:
        save(store, "no tokens", make_content(1, 2, rows=2))
        file = store.describe("long")
    data = ask("info", "long")
    assert data["namespace"] == file.namespace.fields
    assert data["layout"]["dtype"] == "float32"
    assert data["layers"] == [0, 1, 2]
    assert (data["num_tokens"], data["has_token_ids"]) == (_LONG, True)
    used = {name: segment["used_here"] for name, segment in data["segments"].items()}
    assert used.keys() == file.segments.keys()
    assert sum(used.values()) == 4
    other = ask("info", "no tokens")
    assert (other["num_rows"], other["has_token_ids"]) == (2, False)


def test_pin_and_unpin_change_every_session_that_is_named(
    sessions: Run, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("pin", "short", "long") == 0
    assert capsys.readouterr().out == "pinned short, long\n"
    assert [each["is_pinned"] for each in ask("list")["sessions"]] == [True, True]
    assert ask("unpin", "long") == {"names": ["long"], "is_pinned": False}
    assert [each["is_pinned"] for each in ask("list")["sessions"]] == [False, True]


def test_ttl_lets_a_session_expire_and_none_takes_it_back(
    sessions: Run, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("ttl", "short", "7d") == 0
    assert capsys.readouterr().out == "short expires in 7 d\n"
    assert sessions("list") == 0
    assert rows(capsys)[-1].endswith("in 7 d")
    assert ask("ttl", "short", "none") == {"name": "short", "expires_at": None}
    assert ask("info", "short")["expires_at"] is None


def test_rename_keeps_the_session_under_the_new_name(
    sessions: Run, ask: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = ask("info", "short")["identity"]
    assert sessions("rename", "short", "brief") == 0
    assert capsys.readouterr().out == "short is now called brief\n"
    assert ask("info", "brief")["identity"] == before
    assert sessions("rename", "brief", "long") == 2
    assert capsys.readouterr().err == "offload: there is a session 'long' already\n"


def test_delete_removes_all_that_are_named_and_says_what_that_freed(
    ask: Callable[..., Any], root: Path
) -> None:
    data = ask("delete", "short", "long")
    assert data["names"] == ["short", "long"]
    assert data["freed_bytes"] >= 4 * 3 * 3 * 4096
    assert ask("list")["sessions"] == []
    assert not list((root / "segments").rglob("*.kvseg"))


def test_delete_with_one_unknown_name_deletes_nothing(
    sessions: Run, ask: Callable[..., Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("delete", "short", "lost") == 2
    assert capsys.readouterr().err == f"offload: {root} has no session 'lost' among its 2\n"
    assert len(ask("list")["sessions"]) == 2


def test_delete_of_an_open_session_needs_force(
    sessions: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_store(root) as store:
        store.open("long")
        assert sessions("delete", "long") == 2
        assert "'long' is open in 1 caches" in capsys.readouterr().err
        assert sessions("delete", "long", "--force") == 0
        assert [info.name for info in store.list()] == ["short"]


def test_delete_of_all_needs_yes(
    sessions: Run, ask: Callable[..., Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("delete", "--all") == 2
    assert capsys.readouterr().err == f"offload: --all would delete all 2 of {root}; add --yes\n"
    assert ask("delete", "--all", "--yes")["names"] == ["long", "short"]
    assert sessions("delete", "--all", "--yes") == 0
    assert capsys.readouterr().out == "no sessions\n"


def test_verify_of_good_sessions_exits_0_and_says_how_much_was_read(
    sessions: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sessions("verify", "short", "long") == 0
    short, long = rows(capsys)
    assert short.startswith("short: good, 6 chunks, 72 KiB in ")
    assert long.startswith("long: good, 12 chunks, 144 KiB in ")


def test_verify_of_a_damaged_record_exits_1_and_names_it(
    sessions: Run, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_store(root) as store:
        [segment] = store.describe("short").segments
    path = segment_file(root, segment)
    flip(path, 3 * 3 * 4096 + 5000)
    assert sessions("verify", "short", "long") == 1
    found = rows(capsys)
    assert found[0].startswith("short: damaged, 1 bad of 6 chunks")
    assert found[1].startswith("long: damaged, 1 bad of 12 chunks")
    assert f"{path.name} │ 3 │" in found[-1]
    assert sessions("verify", "short", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["is_clean"]
    [record] = data["sessions"]["short"]["bad_records"]
    assert (record["file"], record["index"]) == (str(path), 3)


def test_verify_of_a_damaged_file_exits_1_and_goes_on_with_the_others(
    sessions: Run, ask: Callable[..., Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = ask("info", "long")["identity"]
    [path] = (root / "sessions").rglob(f"{identity}.kvsession")
    flip(path, 20)
    assert sessions("verify", "long", "short") == 1
    long, short = rows(capsys)
    assert long.startswith(f"long: damaged: {path}: header checksum is")
    assert short.startswith("short: good, ")


def test_export_and_import_bring_a_session_to_another_root_byte_for_byte(
    sessions: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "long.kv.tar.zst", tmp_path / "new" / "root"
    assert sessions("export", "long", file) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 12 chunks, ")
    arguments = ["sessions", "import", str(file), "--name", "copy", "--root", str(other)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"copy: {_LONG} tokens, 12 chunks, 144 KiB written")
    with small_store(other) as store:
        expected = expected_payloads(make_content(4, 1, token_ids=_TOKENS))
        assert read_back(store, "copy") == expected


def test_export_and_import_replace_nothing_unless_told_to(
    sessions: Run, ask: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "long.kv.tar.zst"
    file.touch()
    assert sessions("export", "long", file) == 2
    assert f"{file} exists" in capsys.readouterr().err
    assert ask("export", "long", file, "--overwrite")["num_chunks"] == 12
    assert sessions("import", file) == 2
    assert "there is a session 'long' already" in capsys.readouterr().err
    data = ask("import", file, "--overwrite")
    assert (data["name"], data["written_bytes"]) == ("long", 12 * 3 * 4096)


def test_import_whose_prefixes_are_trusted_shares_what_the_root_has(
    sessions: Run, ask: Callable[..., Any], tmp_path: Path
) -> None:
    assert sessions("export", "long", tmp_path / "file") == 0
    data = ask("import", tmp_path / "file", "--name", "copy", "--trust-prefixes")
    assert (data["name"], data["written_bytes"]) == ("copy", 0)


def test_usage_shows_limits_and_who_has_the_space(
    sessions: Run, ask: Callable[..., Any], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_store(root) as store:
        usage = store.usage()
    assert sessions("usage") == 0
    found = rows(capsys)
    for row in (f"root {root}", "quota 64 MiB", "of it garbage 0 B", "to stay free 0 B"):
        assert row in found
    data = ask("usage")
    assert data["used_bytes"] == usage.used_bytes
    assert (data["num_sessions"], data["reserved_bytes"]) == (2, 0)


def test_limits_are_kept_and_make_a_root_that_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "new"
    arguments = ["sessions", "limits", "--root", str(root)]
    assert main([*arguments, "--quota", "1GiB", "--min-free", "2MiB"]) == 0
    assert main([*arguments, "--min-free", "0"]) == 0
    with small_store(root, quota=None, min_free=None) as store:
        usage = store.usage()
    assert (usage.quota_bytes, usage.min_free_bytes) == (1 << 30, 0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["limits"], "nothing to set; give --quota, --min-free, or both"),
        (["limits", "--quota", "much"], "'much' (str) is not a size"),
        (["limits", "--quota", "1MiB"], "quota of 1 MiB: the catalog alone is granted 8 MiB"),
        (["delete"], "name the sessions to delete, or say --all --yes; not both"),
        (["delete", "short", "--all"], "name the sessions to delete, or say --all --yes"),
        (["rename", "short", "../short"], "'../short' is no name for a session"),
        (["import", "nowhere"], "cannot read nowhere"),
    ],
)
def test_sessions_with_an_impossible_argument_say_why_in_one_line(
    sessions: Run,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sessions(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(f"offload: {reason}")
    assert printed.out == ""
