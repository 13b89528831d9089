import math

import pytest

from offload.errors import ConfigError
from offload.evals.cases import Turn
from offload.evals.contenders import find_contender
from offload.evals.reads import Call, Reads
from offload.presets import PRESETS, customised


@pytest.mark.parametrize(
    ("answer", "score"), [("123]", 1.0), ("123] and more", 1.0), (" 123]", 0.0), ("12", 0.0)]
)
def test_turn_that_wants_a_start_scores_nothing_else(answer: str, score: float) -> None:
    assert Turn("?", ("123]",)).score(answer) == score


@pytest.mark.parametrize(
    ("answer", "score"), [("b, then a", 1.0), ("only a", 0.5), ("", 0.0), ("abc", 1.0)]
)
def test_turn_that_wants_texts_scores_the_share_that_the_answer_contains(
    answer: str, score: float
) -> None:
    assert Turn("?", ("a", "b"), starts=False).score(answer) == score


@pytest.mark.parametrize("policy", PRESETS)
def test_contender_without_a_budget_has_that_of_its_preset(policy: str) -> None:
    assert find_contender(policy, "B").preset == PRESETS[policy]


@pytest.mark.parametrize(("text", "budget"), [("0.004", 0.004), ("2048", 2048), ("1.0", 1.0)])
def test_contender_budget_with_a_point_is_a_share_and_without_a_number_of_tokens(
    text: str, budget: float
) -> None:
    found = find_contender(f"quest:{text}", "B")
    assert found.preset.sparse is not None
    assert found.preset.sparse.budget == budget
    assert type(found.preset.sparse.budget) is type(budget)


def test_contender_with_an_error_aims_at_it() -> None:
    found = find_contender("adaptive:error=0.05", "B")
    assert found.preset == customised("adaptive", error=0.05)


def test_contender_takes_a_budget_and_a_deadline() -> None:
    found = find_contender("adaptive:0.02:wait_us=3000", "B")
    assert found.preset == customised("adaptive", budget=0.02, max_wait_us=3000)


@pytest.mark.parametrize(("text", "budget"), [("0.5", 0.5), ("1.0", 1.0), ("300", 300)])
def test_contender_takes_a_budget_of_early_layers(text: str, budget: float) -> None:
    found = find_contender(f"leoam:0.05:early={text}", "B")
    assert found.preset == customised("leoam", budget=0.05, early_budget=budget)


def test_contender_takes_a_codec_of_the_disk() -> None:
    found = find_contender("exact:codec=kivi4", "B")
    assert (found.preset, found.codec) == (PRESETS["exact"], "kivi4")
    assert find_contender("adaptive:0.02", "B").codec == "raw"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact:codec=zip", "no codec 'zip'"),
        (
            "adaptive:speed=2",
            "unknown option 'speed'; known: error, wait_us, early, channels, group, block, memory, "
            "workers, codec",
        ),
        ("fast", "unknown policy 'fast'; known: exact, adaptive"),
        ("adaptive:", "is no number"),
        ("adaptive:some", "is no number"),
        ("adaptive:1.5", "neither a share"),
        ("adaptive:nan", "is no number"),
        ("adaptive:0", "neither a share"),
        ("adaptive:error=", "is no number"),
        ("adaptive:error=2", "no relative error"),
        ("quest:error=0.1", "cannot tell how far off"),
        ("leoam:early=", "is no number"),
        ("leoam:early=0", "neither a share"),
        ("leoam:early=1.5", "neither a share"),
        ("quest:early=0.5", "treats no layers otherwise"),
        ("exact:early=0.5", "reads everything; it takes no early_budget"),
        ("exact:0.5", "reads everything"),
    ],
)
def test_contender_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_contender(name, "B")


def test_contender_of_protocol_a_asks_exactly_and_answers_sparsely() -> None:
    ours, theirs = find_contender("adaptive", "A"), find_contender("adaptive", "B")
    assert (ours.asks_exactly, theirs.asks_exactly) == (True, False)
    assert ours.preset.sparse is not None
    assert ours.preset.sparse.max_queries == ours.piece_tokens == 1


def test_call_sees_all_tokens_before_each_of_its_own_and_itself() -> None:
    assert Call(10, 3).visible_tokens == 11 + 12 + 13


def test_reads_of_nothing_is_everything() -> None:
    assert math.isclose(Reads(0, 0, 0.0).share, 1.0)
