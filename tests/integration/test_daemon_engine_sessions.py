"""Sessions of the engine: where they are, for how long, and what can be done with them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.daemon.errors import (
    Incompatible,
    QuotaExceeded,
    UnknownSession,
)
from offload.daemon.served_model import serve
from tests.support.daemon import Stepped, greedy, recall, sampled, settings_in, tiny
from tests.support.models import make_model

DOCUMENT = [3 + i * 31 % 90 for i in range(100)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Stepped]:
    with Stepped(tiny(), settings_in(tmp_path)) as stepped:
        yield stepped


def test_sessions_of_others_are_unknown(engine: Stepped) -> None:
    engine.run(DOCUMENT[:20], session="chat")

    with pytest.raises(UnknownSession):
        engine.keeper.get("bob", "chat")
    with pytest.raises(UnknownSession):
        engine.keeper.explain("bob", "chat", DOCUMENT)


def test_same_prompt_under_another_name_makes_another_session(engine: Stepped) -> None:
    for name in ("one", "two", "three"):
        client = engine.run(DOCUMENT[:40], session=name)
        assert client.started.session == name

    assert [client.asked.session for client in engine.clients] == ["one", "two", "three"]
    assert {view.name for view in engine.keeper.list("ann")} == {"one", "two", "three"}
    assert client.started.cached.total == 39
    assert engine.keeper.get("ann", "three").parent in ("one", "two")


def test_session_that_shares_only_a_beginning_has_no_parent(engine: Stepped) -> None:
    engine.run(DOCUMENT[:60], session="one")

    client = engine.run([*DOCUMENT[:10], *DOCUMENT[40:60]], session="two")

    assert client.started.cached.total == 10
    assert engine.keeper.get("ann", "two").parent is None


def test_other_weights_under_the_same_name_miss_and_say_so(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with Stepped(tiny(), settings) as engine:
        engine.run(DOCUMENT[:50], session="chat")
    other = serve(make_model("qwen3", seed=1), recall().tokenizer, "qwen3")

    with Stepped(other, settings) as engine:
        client = engine.run(DOCUMENT[:50], session="chat")

    assert client.started.cached.total == 0
    assert client.started.miss is not None
    assert client.started.miss.reason == "incompatible"
    assert client.tokens == greedy(other, DOCUMENT[:50], 8)


def test_fork_shares_what_it_has_and_goes_its_own_way(engine: Stepped) -> None:
    engine.run(DOCUMENT[:50], session="chat")
    used = engine.worker.parts.engine.tiers[0].used_bytes

    copy = engine.keeper.fork("ann", "chat", "copy", 24)

    assert copy.num_tokens == 24
    assert copy.parent == "chat"
    assert engine.worker.parts.engine.tiers[0].used_bytes == used
    client = engine.run([*DOCUMENT[:24], 9, 9, 9], session="copy")
    assert client.started.cached.total == 24
    assert engine.keeper.get("ann", "chat").num_tokens == 57


def test_explanation_shows_where_a_prompt_leaves_a_session(tmp_path: Path) -> None:
    model = recall()
    told = model.tokenizer.encode("The quick brown fox jumps over the lazy dog, twice a day.")
    asked = model.tokenizer.encode("The quick brown fox jumps over the lazy cat, once.")
    with Stepped(model, settings_in(tmp_path)) as engine:
        engine.run(told, session="chat")
        found = engine.keeper.explain("ann", "chat", asked)

    assert found.num_common_tokens == 40
    assert found.session_text[found.split_at :].startswith("dog, twice")
    assert found.prompt_text[found.split_at :] == "cat, once."
    assert found.miss == "diverged"


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_idle_session_leaves_the_device_and_is_found_again(tier: str, engine: Stepped) -> None:
    first = engine.run(DOCUMENT[:64], session="chat")

    view = engine.keeper.evict("ann", "chat", tier)

    assert view.state == tier
    again = engine.run(DOCUMENT[:64] + first.tokens + [4], session="chat")
    cached = dataclasses.asdict(again.started.cached)
    assert cached[tier] >= 64
    assert again.tokens == greedy(tiny(), DOCUMENT[:64] + first.tokens + [4], 8)


def test_prefetch_brings_a_session_into_memory(engine: Stepped) -> None:
    engine.run(DOCUMENT[:64], session="chat")
    engine.keeper.evict("ann", "chat", "disk")

    while not engine.keeper.prefetch_some("ann", "chat"):
        continue

    tokens = engine.keeper.get("ann", "chat").tokens
    assert tokens.disk == 0
    assert tokens.total == 71
    engine.check()


def test_idle_sessions_move_down_by_themselves(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, idle_to_host_s=0.0, idle_to_disk_s=None)
    with Stepped(tiny(), settings) as engine:
        engine.run(DOCUMENT[:30], session="chat")
        assert engine.worker.parts.housekeeping.work()
        assert engine.keeper.get("ann", "chat").state == "host"


def test_idle_sessions_are_saved_and_closed_by_themselves(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, idle_to_disk_s=0.0)) as engine:
        engine.run(DOCUMENT[:30], session="chat")
        assert engine.worker.parts.housekeeping.work()
        view = engine.keeper.get("ann", "chat")
        assert view.state == "disk"
        assert view.dirty_tokens == 0
        assert not engine.worker.parts.book.branches


def test_expired_session_is_deleted_and_its_miss_says_so(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, ttl_s=1e-9)) as engine:
        engine.run(DOCUMENT[:30], session="chat")
        assert engine.worker.parts.housekeeping.work()
        with pytest.raises(UnknownSession):
            engine.keeper.get("ann", "chat")
        again = engine.run(DOCUMENT[:30], session="chat")

    assert again.started.miss is not None
    assert again.started.miss.reason == "expired"


def test_answer_is_saved_while_it_grows(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, persist_interval_s=0.0)
    engine = Stepped(tiny(), settings)
    client = engine.ask(DOCUMENT[:30], session="chat", sampling=sampled(max_tokens=60))
    while len(client.tokens) < 40:
        engine.turn()
        client.take()
    engine.crash()

    with Stepped(tiny(), settings) as again:
        whole = DOCUMENT[:30] + client.tokens[:30]
        resumed = again.run(whole, session="chat")
    assert resumed.started.cached.disk >= 30
    assert resumed.tokens == greedy(tiny(), whole, 8)


def test_write_through_saves_every_answer(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, persist="write_through")) as engine:
        engine.run(DOCUMENT[:30], session="chat")
        assert engine.keeper.get("ann", "chat").dirty_tokens == 0


def test_too_many_sessions_are_refused_but_unnamed_ones_make_room(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, max_per_tenant=2)) as engine:
        engine.keeper.create("ann", "one", None, False)
        unnamed = engine.run(DOCUMENT[:20])
        engine.keeper.create("ann", "two", None, False)
        names = [each.name for each in engine.keeper.list("ann")]

        assert unnamed.started.session not in names
        with pytest.raises(QuotaExceeded, match="2 sessions"):
            engine.keeper.create("ann", "three", None, False)
        late = engine.ask(DOCUMENT[:20], session="three")
        engine.finish(late)
        assert isinstance(late.error, QuotaExceeded)


def test_pins_take_no_more_than_their_share(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, disk_quota_bytes=32 << 20, hard_pin_share=1e-3)
    with Stepped(tiny(), settings) as engine:
        engine.run(DOCUMENT, session="chat")
        with pytest.raises(QuotaExceeded, match="pinned"):
            engine.keeper.update("ann", "chat", pin=True, ttl_s=None)


def test_changes_of_a_session_survive_a_restart(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with Stepped(tiny(), settings) as engine:
        engine.run(DOCUMENT[:40], session="chat")
        engine.keeper.persist("ann", "chat")
        engine.keeper.update("ann", "chat", pin=True, ttl_s=math.inf)

    with Stepped(tiny(), settings) as engine:
        view = engine.keeper.get("ann", "chat")

    assert view.is_pinned
    assert view.ttl_s is None
    assert view.num_requests == 1


def test_archive_brings_a_session_back(engine: Stepped, tmp_path: Path) -> None:
    first = engine.run(DOCUMENT[:40], session="chat")
    store = engine.keeper.prepare_export("ann", "chat")
    store.export("chat", tmp_path / "chat.kv")
    engine.keeper.delete("ann", "chat")

    engine.keeper.prepare_import("ann", "back").import_(tmp_path / "chat.kv", "back")
    engine.keeper.complete_import("ann", "back")

    whole = DOCUMENT[:40] + first.tokens + [5]
    again = engine.run(whole, session="back")
    assert again.started.cached.disk == 47
    assert again.tokens == greedy(tiny(), whole, 8)


def test_archive_of_another_tenant_is_refused(engine: Stepped, tmp_path: Path) -> None:
    engine.run(DOCUMENT[:40], session="chat")
    engine.keeper.prepare_export("ann", "chat").export("chat", tmp_path / "chat.kv")

    engine.keeper.prepare_import("bob", "stolen").import_(tmp_path / "chat.kv", "stolen")

    with pytest.raises(Incompatible, match="salt"):
        engine.keeper.complete_import("bob", "stolen")
    assert not engine.keeper.list("bob")


def test_folders_and_files_are_private(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path / "data")) as engine:
        engine.run(DOCUMENT[:40], session="chat")

    for path in (tmp_path / "data").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
        assert "ann" not in path.name


def test_request_that_fails_before_its_first_piece_leaves_no_unnamed_session(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": "384KiB", "cpu": "64KiB", "disk": "64KiB"}
    changes = {"capacity": capacity, "prefill_tokens": 512}
    with Stepped(tiny(), settings_in(tmp_path, **changes)) as engine:
        large = engine.ask([3 + i % 90 for i in range(500)])
        engine.finish()

        assert large.error is not None
        assert not engine.keeper.list("ann")


def test_sessions_that_share_records_on_disk_share_them_in_memory(engine: Stepped) -> None:
    engine.run(DOCUMENT[:64], session="one")
    engine.keeper.fork("ann", "one", "two", 60)
    for name in ("one", "two"):
        engine.keeper.evict("ann", name, "disk")
    before = len(engine.worker.parts.engine.store.table)

    for name in ("one", "two"):
        engine.keeper.prefetch_some("ann", name)

    added = len(engine.worker.parts.engine.store.table) - before
    assert added == 3 * 8  # layers, and the chunks of the longer of the two
    engine.keeper.delete("ann", "one")
    engine.check()
    again = engine.run(DOCUMENT[:64], session="two")
    assert again.started.cached.total == 60
    assert again.tokens == greedy(tiny(), DOCUMENT[:64], 8)
