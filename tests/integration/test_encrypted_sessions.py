"""Encrypted sessions, scratch files and daemons with real models: the same tokens, and no trace."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import ConfigError, OffloadedCache, SessionStore
from offload.cli import main
from offload.daemon.requests import CachedTokens
from offload.key_files import make_key_file
from offload.sessions.key_file import open_key
from offload.tiers.sealing import Sealer
from tests.support.daemon import Stepped, greedy, settings_in, tiny
from tests.support.generation import generate, prompt
from tests.support.model_sessions import assert_model_continues, save_model_session
from tests.support.models import make_model, tight_capacity
from tests.support.small_caches import draw_ids

KEY = bytes(range(32))
SIZE = 8

Options = dict[str, Any]
DOCUMENT = [3 + i * 31 % 90 for i in range(100)]


def holds(root: Path, *needles: bytes) -> list[Path]:
    """Return the files below a folder that hold one of some bytes."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in files if any(needle in path.read_bytes() for needle in needles)]


def as_stored(ids: list[int]) -> list[bytes]:
    """Return how a few tokens may look on a disk."""
    text = str(ids)[1:-1]
    as_bytes = [
        torch.tensor(ids, dtype=kind).numpy().tobytes() for kind in (torch.int64, torch.int32)
    ]
    return [*as_bytes, text.encode(), text.replace(" ", "").encode()]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    with SessionStore(tmp_path / "root", quota="256MiB", min_free=0, key=KEY) as opened:
        yield opened
        assert opened.fsck().is_clean


def test_encrypted_session_goes_on_token_identically_in_another_store(
    store: SessionStore, tmp_path: Path
) -> None:
    save_model_session(store, "chat", 3, tmp_path)
    tokens = draw_ids(1, 60, 3)[0, 5:11].tolist()

    with SessionStore(store.path, key=KEY) as other:
        assert_model_continues(other, "chat", 3, tmp_path)
    assert not holds(store.path, *as_stored(tokens))


@pytest.mark.parametrize("codec", ["raw", "bf16x"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3_next", "deepseek_v3"])
def test_cache_whose_disk_is_encrypted_generates_the_same_tokens(
    architecture: str, codec: str, tmp_path: Path
) -> None:
    model, ids = make_model(architecture), prompt(1, 70)
    options: Options = {"capacity": tight_capacity(model, 1, SIZE), "chunk_tokens": SIZE}
    outcomes = []
    for encrypted in (False, True):
        with OffloadedCache(
            ("gpu", "cpu", "disk"),
            disk_path=tmp_path,
            encrypted=encrypted,
            codec=codec,
            **options,
        ) as cache:
            outcomes.append(generate(model, cache, inputs=ids).tokens)
    assert torch.equal(outcomes[0][0], outcomes[1][0])


def test_prefix_of_an_encrypted_store_is_reused(store: SessionStore, tmp_path: Path) -> None:
    model, ids = make_model("llama"), prompt(1, 70)
    options: Options = {"capacity": tight_capacity(model, 1, SIZE), "chunk_tokens": SIZE}
    tiers = ("gpu", "cpu", "disk")
    with OffloadedCache(tiers, disk_path=tmp_path / "a", **options) as cache:
        expected = generate(model, cache, inputs=ids).tokens[0]
        cache.save("chat", store=store, model=model, token_ids=expected)

    with OffloadedCache(tiers, disk_path=tmp_path / "b", encrypted=True, **options) as cache:
        assert cache.reuse(ids, model, store=store) == 64
        assert torch.equal(generate(model, cache, inputs=ids).tokens[0], expected)


@pytest.mark.parametrize(
    ("tiers", "policy", "what"),
    [
        (("gpu", "cpu"), "exact", "for the tier 'disk'"),
        (("gpu", "cpu", "disk"), "instinfer", "beside the disk"),
    ],
)
def test_encryption_that_would_leave_something_plain_is_refused(
    tiers: tuple[str, ...], policy: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=what):
        OffloadedCache(
            tiers,
            policy=policy,
            encrypted=True,
            disk_path=tmp_path if "disk" in tiers else None,
            capacity=dict.fromkeys(tiers, "1MiB"),
        )


def test_daemon_with_a_key_goes_on_after_a_restart_and_leaves_no_trace(tmp_path: Path) -> None:
    model, settings = tiny(), settings_in(tmp_path, sealer=Sealer(KEY), persist="write_through")
    with Stepped(model, settings) as engine:
        first = engine.run(DOCUMENT[:50], session="chat")
        assert not holds(tmp_path, *as_stored(DOCUMENT[4:10]))
    whole = DOCUMENT[:50] + first.tokens + [7, 8, 9]
    assert not holds(tmp_path, *as_stored(DOCUMENT[4:10]), *as_stored(first.tokens))

    with Stepped(model, settings) as engine:
        second = engine.run(whole, session="chat")

    assert second.started.cached == CachedTokens(disk=57)
    assert second.tokens == greedy(model, whole, 8)


def test_store_of_a_tenant_is_checked_with_the_key_of_the_daemon(tmp_path: Path) -> None:
    key, data_path = tmp_path / "key", tmp_path / "data"
    key.write_bytes(KEY)
    key.chmod(0o600)
    data_path.mkdir()
    sealer = open_key(data_path, KEY, lambda: True)
    settings = settings_in(data_path, sealer=sealer, persist="write_through")
    with Stepped(tiny(), settings) as engine:
        engine.run(DOCUMENT[:50], session="chat")
    [root] = data_path.glob("tenants/*/kv")

    assert main(["fsck", str(root), "--key-file", str(key)]) == 0
    rotation = ["config", "rotate-encryption-key", str(data_path), "--key-file", str(key)]
    make_key_file(tmp_path / "new")
    assert main([*rotation, "--new-key-file", str(tmp_path / "new")]) == 0
    assert main(["fsck", str(root), "--key-file", str(key)]) == 2
    assert main(["sessions", "verify", "chat", "--root", str(root)]) == 2
    read = ["--root", str(root), "--key-file", str(tmp_path / "new")]
    assert main(["sessions", "verify", "chat", *read]) == 0


def test_daemon_without_a_key_leaves_the_trace_that_is_looked_for(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, persist="write_through")) as engine:
        engine.run(DOCUMENT[:50], session="chat")

    suffixes = {path.suffix for path in holds(tmp_path, *as_stored(DOCUMENT[4:10]))}
    assert suffixes == {".kvsession", ".json"}


def test_commands_open_an_encrypted_store_with_its_key_file_only(
    store: SessionStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model_session(store, "chat", 3, tmp_path)
    root, key, new = str(store.path), tmp_path / "key", str(tmp_path / "new")
    key.write_bytes(KEY)
    key.chmod(0o600)

    assert main(["fsck", root, "--key-file", str(key)]) == 0
    assert main(["sessions", "verify", "chat", "--root", root, "--key-file", str(key)]) == 0
    assert main(["fsck", root]) == 0
    assert "Without its key only checksums were compared" in capsys.readouterr().out
    assert main(["sessions", "list", "--root", root]) == 2
    assert main(["fsck", root, "--repair"]) == 2
    assert main(["config", "encryption-key", new]) == 0
    rotation = ["rotate-encryption-key", root, "--key-file", str(key), "--new-key-file", new]
    assert main(["config", *rotation]) == 0
    assert main(["fsck", root, "--key-file", str(key)]) == 2
    assert main(["fsck", root, "--key-file", new]) == 0
