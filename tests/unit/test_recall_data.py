"""Documents with hidden records: what they hold, and what counts as an answer."""

import pytest

from offload.errors import ConfigError
from offload.recall_data import (
    BOS_TOKEN_ID,
    MAX_ANSWER_TOKENS,
    Fact,
    build_document,
    corpus,
    encode,
    is_correct,
)

FACT = Fact("qmzk", "4821")


@pytest.mark.parametrize(
    ("num_tokens", "num_facts"), [(1, 0), (64, 4), (4000, 40), (32768, 327), (400_000, 4000)]
)
def test_document_of_a_given_size_has_exactly_that_many_tokens_and_facts(
    num_tokens: int, num_facts: int
) -> None:
    document = build_document(num_tokens, num_facts, seed=0)
    assert len(document.token_ids) == num_tokens
    assert len(document.facts) == num_facts
    assert len({fact.key for fact in document.facts}) == num_facts


def test_document_starts_with_bos_and_holds_bytes_after_it() -> None:
    document = build_document(500, 5, seed=0)
    assert document.token_ids[0] == BOS_TOKEN_ID
    assert all(0 <= token_id < 256 for token_id in document.token_ids[1:])


def test_facts_of_a_document_stand_where_they_say_and_in_order() -> None:
    document = build_document(4000, 40, seed=1)
    found = [
        document.token_ids[fact.position : fact.position + len(fact.record)]
        for fact in document.facts
    ]
    assert found == [encode(f"\n[{fact.key}:{fact.value}]") for fact in document.facts]
    positions = [fact.position for fact in document.facts]
    assert positions == sorted(positions)


def test_document_without_its_records_is_a_passage_of_the_heldout_text() -> None:
    document = build_document(4000, 40, seed=2)
    text = bytes(document.token_ids[1:]).decode()
    for fact in document.facts:
        text = text.replace(fact.record, "", 1)
    # Twice, because a passage that reaches the end goes on at the beginning.
    assert text in corpus("heldout") * 2
    assert text[:2000] not in corpus("train")


def test_document_of_the_same_seed_is_the_same() -> None:
    assert build_document(1000, 10, seed=7) == build_document(1000, 10, seed=7)


def test_document_of_another_seed_differs() -> None:
    assert build_document(1000, 10, seed=7) != build_document(1000, 10, seed=8)


def test_question_is_the_start_of_the_record_up_to_its_value() -> None:
    document = build_document(1000, 10, seed=0)
    fact = document.facts[3]
    assert document.question(fact) == encode(f"\n[{fact.key}:")


@pytest.mark.parametrize("after", ["", "\n[", "4821]"])
def test_answer_with_value_and_bracket_is_correct_whatever_follows(after: str) -> None:
    assert is_correct(FACT, encode("4821]" + after))


@pytest.mark.parametrize("answer", ["", "4821", "482]", "48210]", " 4821]", "4822]"])
def test_answer_that_is_not_the_whole_value_is_wrong(answer: str) -> None:
    assert not is_correct(FACT, encode(answer))


def test_longest_answer_fits_the_tokens_to_generate() -> None:
    document = build_document(4000, 40, seed=0)
    assert max(len(fact.answer) for fact in document.facts) == MAX_ANSWER_TOKENS


@pytest.mark.parametrize(
    ("num_tokens", "num_facts", "message"),
    [
        (100, -1, "cannot hold -1 facts"),
        (100, 10, "10 facts need"),
        (0, 0, "to have 0"),
        (1_000_000, 0, "needs 999999 bytes of text"),
        (100, 26**4 + 1, "only 456976"),
    ],
)
def test_document_that_cannot_be_built_is_refused_with_the_number(
    num_tokens: int, num_facts: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_document(num_tokens, num_facts, seed=0)


def test_corpus_is_ascii_and_its_parts_share_no_line_of_length() -> None:
    train, heldout = corpus("train"), corpus("heldout")
    assert train.isascii()
    assert heldout.isascii()
    long_lines = {line for line in train.splitlines() if len(line) > 120}
    assert long_lines.isdisjoint(heldout.splitlines())
