"""What is left of sessions when the daemon dies, the disk fills up, or bytes are flipped."""

import json
from pathlib import Path

import pytest

from offload.errors import StorageError
from tests.support.daemon import Stepped, greedy, settings_in, tiny
from tests.support.daemon_victim import victim
from tests.support.full_disks import file_size_limit

DOCUMENT = [3 + i * 31 % 90 for i in range(100)]
PROMPTS = {"one": DOCUMENT[:60], "two": DOCUMENT[10:50], "three": DOCUMENT[5:30]}


def test_sessions_go_on_after_a_kill_amid_their_answers(tmp_path: Path) -> None:
    told: dict[str, list[int]] = {name: [] for name in PROMPTS}
    with victim(tmp_path, PROMPTS) as process:
        assert process.stdout is not None
        for line in process.stdout:
            name, token, persists = json.loads(line)
            told[name].append(token)
            if persists >= 9 and min(map(len, told.values())) >= 40:
                process.kill()
                break

    with Stepped(tiny(), settings_in(tmp_path)) as engine:
        assert [each.name for each in engine.keeper.list("ann")] == sorted(PROMPTS)
        for name, ids in PROMPTS.items():
            whole = ids + told[name]
            client = engine.run(whole, session=name)
            assert client.started.session == name
            assert client.started.cached.disk >= len(ids)
            assert client.started.cached.disk == client.started.cached.total
            assert client.tokens == greedy(tiny(), whole, 8)


def test_flipped_byte_is_a_miss_and_is_computed_again(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path)) as engine:
        first = engine.run(DOCUMENT, session="chat")
    [segment] = [path for path in tmp_path.rglob("*") if path.parent.parent.name == "segments"]
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    whole = DOCUMENT + first.tokens + [5]

    with Stepped(tiny(), settings_in(tmp_path)) as engine:
        client = engine.run(whole, session="chat")
        assert client.tokens == greedy(tiny(), whole, 8)
        assert client.started.miss is not None
        assert client.started.miss.reason == "corrupt"
        assert client.finished.cached.total < len(DOCUMENT)
        again = engine.run(whole + client.tokens, session="chat")
        assert again.started.cached.total == len(whole) + 7


def test_full_disk_is_counted_and_the_session_is_served_from_memory(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path)) as engine:
        first = engine.run(DOCUMENT, session="chat")
        with file_size_limit(4096), pytest.raises(StorageError):
            engine.worker.do(engine.keeper.persist, "ann", "chat")
        state = engine.worker.snapshot(is_ready=True, is_draining=False)
        assert state.totals.failed_persists == 1

        whole = DOCUMENT + first.tokens + [5]
        client = engine.run(whole, session="chat")

        assert client.started.cached.device == len(whole) - 2
        assert engine.keeper.persist("ann", "chat").dirty_tokens == 0


def test_session_without_room_anywhere_is_lost_but_not_the_others(tmp_path: Path) -> None:
    capacity = {"gpu": "640KiB", "cpu": "96KiB", "disk": "256KiB"}
    with Stepped(tiny(), settings_in(tmp_path, capacity=capacity)) as engine:
        with file_size_limit(1 << 20):
            for start in range(6):
                ids = [3 + (i * (7 + start)) % 90 for i in range(150)]
                client = engine.run(ids, session=f"chat-{start}")
                assert client.tokens == greedy(tiny(), ids, 8)
        totals = engine.worker.snapshot(is_ready=True, is_draining=False).totals

    assert totals.failed == 0
    assert totals.evictions["disk"] + totals.evictions.get("none", 0) > 0
