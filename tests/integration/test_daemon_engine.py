"""The engine of the daemon: what is reused, what is refused, and what is said."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.daemon.errors import (
    BadRequest,
    ContextTooLong,
    QueueFull,
    SessionBusy,
)
from offload.daemon.requests import (
    CachedTokens,
    Finished,
    PrefillProgress,
    PromptLogprobs,
    Sampling,
    Started,
    Token,
)
from tests.support.daemon import Stepped, greedy, recall, sampled, settings_in, tiny

DOCUMENT = [3 + i * 31 % 90 for i in range(100)]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Stepped]:
    with Stepped(tiny(), settings_in(tmp_path)) as stepped:
        yield stepped


def test_events_of_a_request_come_in_order(engine: Stepped) -> None:
    client = engine.run(DOCUMENT[:40])

    kinds = [type(event) for event in client.events]
    assert kinds == [Started] + [PrefillProgress] * 3 + [Token] * 8 + [Finished]
    assert client.progress == [16, 32, 40]
    assert client.finished.num_prompt_tokens == 40
    assert client.finished.num_generated_tokens == 8
    assert client.finished.num_written_tokens == 40


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "qwen3_next", "deepseek_v3"])
def test_requests_side_by_side_answer_as_alone(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    prompts = [DOCUMENT[start : start + length] for start, length in ((0, 5), (7, 60), (30, 33))]

    with Stepped(model, settings_in(tmp_path)) as engine:
        clients = [engine.ask(prompt, sampling=sampled(max_tokens=20)) for prompt in prompts]
        engine.finish()

    assert [each.tokens for each in clients] == [greedy(model, each, 20) for each in prompts]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "qwen3_next", "deepseek_v3"])
def test_next_turn_after_restart_is_read_from_disk(architecture: str, tmp_path: Path) -> None:
    model, settings = tiny(architecture), settings_in(tmp_path)
    with Stepped(model, settings) as engine:
        first = engine.run(DOCUMENT[:50], session="chat")
    whole = DOCUMENT[:50] + first.tokens + [7, 8, 9]

    with Stepped(model, settings) as engine:
        assert [each.name for each in engine.keeper.list("ann")] == ["chat"]
        second = engine.run(whole, session="chat")

    assert second.started.cached == CachedTokens(disk=57)
    assert second.started.restored_bytes > 0
    assert second.tokens == greedy(model, whole, 8)


def test_prompt_without_session_goes_on_in_the_one_it_extends(engine: Stepped) -> None:
    first = engine.run(DOCUMENT[:30], session="chat")

    second = engine.run(DOCUMENT[:30] + first.tokens + [4, 5])

    assert second.started.session == "chat"
    assert second.started.cached.total == 37


def test_prompt_without_session_that_leaves_another_gets_its_own(engine: Stepped) -> None:
    engine.run(DOCUMENT[:60], session="chat")

    other = engine.run([*DOCUMENT[:40], 5, 6, 7])

    assert other.started.session not in (None, "chat")
    assert other.started.cached.total == 40
    assert other.started.miss is not None
    assert other.started.miss.reason == "diverged"
    assert engine.keeper.get("ann", other.started.session).parent == "chat"
    assert engine.keeper.get("ann", "chat").num_tokens == 67


def test_short_prompt_without_session_leaves_nothing(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, auto_create_min_tokens=50)) as engine:
        client = engine.run(DOCUMENT[:20])

        assert client.started.session is None
        assert not engine.keeper.list("ann")
        assert not engine.worker.parts.book.branches


def test_same_prompt_again_computes_one_token(engine: Stepped) -> None:
    first = engine.run(DOCUMENT[:30], session="chat")

    again = engine.run(DOCUMENT[:30], session="chat")

    assert again.started.cached.total == 29
    assert again.started.miss is None
    assert again.tokens == first.tokens


@pytest.mark.parametrize("changes", [{"tenant": "bob"}, {"cache_salt": "pepper"}])
def test_keys_of_others_are_never_used(engine: Stepped, changes: dict[str, str]) -> None:
    engine.run(DOCUMENT[:50], session="chat")
    engine.keeper.persist("ann", "chat")
    engine.keeper.evict("ann", "chat", "disk")

    other = engine.run(DOCUMENT[:50], session="chat", **changes)

    assert other.started.cached.total == 0


def test_request_that_is_not_kept_leaves_sessions_as_they_were(engine: Stepped) -> None:
    engine.run(DOCUMENT[:30], session="chat")
    before = engine.keeper.get("ann", "chat").num_tokens

    client = engine.run([*DOCUMENT[:30], 4, 5], session="chat", is_kept=False)

    assert client.started.cached.total == 30
    assert client.finished.num_written_tokens == 0
    assert engine.keeper.get("ann", "chat").num_tokens == before


def test_cancelled_prefill_is_kept_and_gone_on_from(engine: Stepped) -> None:
    client = engine.ask(DOCUMENT, session="chat")
    engine.turn()
    engine.turn()
    client.leave()
    engine.turn()

    again = engine.run(DOCUMENT, session="chat")

    assert again.started.cached.total == 32
    assert again.tokens == greedy(tiny(), DOCUMENT, 8)
    assert engine.worker.snapshot(is_ready=True, is_draining=False).totals.cancelled == 1


@pytest.mark.parametrize(("how", "kept"), [("discard", 30), ("continue", 107)])
def test_departure_of_a_client_is_handled_as_configured(
    how: str, kept: int, tmp_path: Path
) -> None:
    with Stepped(tiny(), settings_in(tmp_path, on_disconnect=how)) as engine:
        engine.run(DOCUMENT[:23], session="chat")
        whole = DOCUMENT[:23] + greedy(tiny(), DOCUMENT[:23], 8)
        client = engine.ask(whole + DOCUMENT[:69], session="chat")
        engine.turn()
        client.leave()
        for _ in range(30):
            engine.turn()

        assert engine.keeper.get("ann", "chat").num_tokens == kept


def test_long_prompt_does_not_stop_the_answers_of_others(engine: Stepped) -> None:
    talker = engine.ask(DOCUMENT[:5], sampling=sampled(max_tokens=40))
    engine.turn()
    talker.take()
    reader = engine.ask(DOCUMENT, tenant="bob")
    for _ in range(7):
        before = len(talker.tokens)
        engine.turn()
        talker.take()
        assert len(talker.tokens) == before + 1
    reader.take()
    assert reader.progress == [16, 32, 48, 64, 80, 96, 100]


def test_third_request_of_a_session_waits_and_fourth_is_refused(engine: Stepped) -> None:
    clients = [engine.ask(DOCUMENT[:20], session="chat") for _ in range(3)]
    with pytest.raises(SessionBusy, match="3"):
        engine.ask(DOCUMENT[:20], session="chat")

    engine.turn()
    assert len(engine.worker.parts.scheduler.running) == 1
    engine.finish()

    assert [each.started.cached.total for each in clients] == [0, 19, 19]


def test_full_queue_refuses_and_says_when_to_come_again(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, max_running=1, max_waiting=1)) as engine:
        engine.ask(DOCUMENT[:5])
        engine.ask(DOCUMENT[:6])
        with pytest.raises(QueueFull, match="2 requests") as refusal:
            engine.ask(DOCUMENT[:7])
        assert refusal.value.retry_after_s >= 1
        engine.finish()
        engine.run(DOCUMENT[:7])


def test_request_that_waits_too_long_is_refused(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, max_running=1, queue_timeout_s=0.0)) as engine:
        late = engine.ask(DOCUMENT[:5])
        engine.finish(late)

        assert isinstance(late.error, QueueFull)


@pytest.mark.parametrize(
    ("ids", "sampling", "error"),
    [
        ([], sampled(), BadRequest),
        ([3, 4096], sampled(), BadRequest),
        ([-1], sampled(), BadRequest),
        ([3] * 512, sampled(), ContextTooLong),
        ([3], sampled(logit_bias={1 << 20: 1.0}), BadRequest),
    ],
)
def test_impossible_request_is_refused(
    engine: Stepped, ids: list[int], sampling: Sampling, error: type[Exception]
) -> None:
    with pytest.raises(error):
        engine.ask(ids, sampling=sampling)


def test_impossible_session_name_is_refused(engine: Stepped) -> None:
    with pytest.raises(BadRequest, match="no name"):
        engine.ask([3], session="../etc")


def test_answer_ends_where_the_context_is_full(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, max_context_tokens=32)) as engine:
        client = engine.run(DOCUMENT[:25], sampling=sampled(max_tokens=None))

    assert client.finished.reason == "length"
    assert client.finished.num_generated_tokens == 7


def test_prompt_alone_can_be_read(engine: Stepped) -> None:
    client = engine.run(DOCUMENT[:25], session="chat", sampling=sampled(max_tokens=0))

    assert client.finished.num_generated_tokens == 0
    assert engine.keeper.get("ann", "chat").num_tokens == 25


def test_capacity_that_is_too_small_for_all_preempts_and_finishes_all(tmp_path: Path) -> None:
    capacity = {"gpu": "640KiB", "cpu": "96KiB", "disk": "256KiB"}
    prompts = [[3 + (i * k) % 90 for i in range(150)] for k in (7, 11, 13)]
    with Stepped(tiny(), settings_in(tmp_path, capacity=capacity)) as engine:
        clients = [engine.ask(each, sampling=sampled(max_tokens=60)) for each in prompts]
        engine.finish()
        totals = engine.worker.snapshot(is_ready=True, is_draining=False).totals

    assert [each.tokens for each in clients] == [greedy(tiny(), each, 60) for each in prompts]
    assert totals.preemptions > 0


def test_prompt_larger_than_every_tier_fails_alone(tmp_path: Path) -> None:
    capacity = {"gpu": "384KiB", "cpu": "64KiB", "disk": "64KiB"}
    with Stepped(tiny(), settings_in(tmp_path, capacity=capacity)) as engine:
        large = engine.ask([3 + i % 90 for i in range(500)])
        engine.finish()
        assert large.error is not None
        assert "capacity" in str(large.error)
        small = engine.run(DOCUMENT[:20])

    assert small.tokens == greedy(tiny(), DOCUMENT[:20], 8)


def test_prompt_logprobs_are_those_of_the_model(engine: Stepped) -> None:
    engine.run(DOCUMENT[:40], session="chat")
    wanted = sampled(prompt_logprobs=True, top_logprobs=2)

    client = engine.run(DOCUMENT[:40], session="chat", sampling=wanted)

    [found] = [event for event in client.events if isinstance(event, PromptLogprobs)]
    assert [each.token_id for each in found.tokens] == DOCUMENT[1:40]
    assert client.started.cached.total == 0
    for token, tops in zip(found.tokens, found.tops, strict=True):
        assert len(tops) == 2
        assert tops[0].logprob >= tops[1].logprob >= token.logprob or token in tops


def test_answer_fits_its_schema(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [7, 8]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = Sampling(temperature=1.0, seed=3, max_tokens=400, grammar=json.dumps(schema))
    with Stepped(recall(), settings_in(tmp_path)) as engine:
        client = engine.run(DOCUMENT[:20], sampling=wanted)

    assert client.finished.reason == "stop"
    assert json.loads(client.text).keys() == {"name", "age"}


def test_impossible_schema_is_refused(engine: Stepped) -> None:
    client = engine.ask(DOCUMENT[:5], sampling=sampled(grammar='{"type": 7}'))
    engine.finish(client)

    assert isinstance(client.error, BadRequest)


def test_seed_decides_whatever_else_is_computed(engine: Stepped) -> None:
    wanted = Sampling(temperature=1.5, top_p=0.95, seed=11, max_tokens=30, ignore_eos=True)
    alone = engine.run(DOCUMENT[:20], sampling=wanted, tenant="one")
    others = [engine.ask(DOCUMENT[i : i + 30], tenant=f"x{i}") for i in range(3)]

    beside = engine.run(DOCUMENT[:20], sampling=wanted, tenant="two")

    engine.finish(*others)
    assert beside.tokens == alone.tokens


def test_snapshot_counts_what_happened(engine: Stepped) -> None:
    first = engine.run(DOCUMENT[:40], session="chat")
    engine.run(DOCUMENT[:40] + first.tokens + [5], session="chat")

    state = engine.worker.snapshot(is_ready=True, is_draining=False)

    assert state.totals.requests == 2
    assert state.totals.prompt_tokens == 89
    assert state.totals.cached.total == 47
    assert state.totals.computed_tokens == 42
    assert state.totals.generated_tokens == 16
    assert state.totals.misses == {"cold": 2}
    assert state.sessions == {"running": 0, "device": 1, "host": 0, "disk": 0}
    assert [tier.name for tier in state.tiers] == ["device", "host", "disk"]
    assert state.tiers[0].written_bytes > 0
