import random
import re
from collections import Counter

import pytest

from offload.errors import ConfigError
from offload.evals import prose
from offload.evals.cases import Case

_TOKENS = 3000


def count(text: str) -> int:
    """About as many tokens as a real tokenizer makes: words and what stands between them."""
    return len(re.findall(r"\w{1,5}|[^\w\s]", text))


def make(task: str, seed: int = 0) -> Case:
    return prose.TASKS[task](_TOKENS, 6, random.Random(seed), count)


@pytest.mark.parametrize("task", prose.TASKS)
def test_prose_case_of_the_same_seed_is_the_same_and_of_another_is_not(task: str) -> None:
    assert make(task) == make(task)
    assert make(task) != make(task, seed=1)


@pytest.mark.parametrize("task", prose.TASKS)
def test_prose_document_has_about_the_length_asked_for(task: str) -> None:
    assert count(make(task).document) == pytest.approx(_TOKENS, rel=0.02)


@pytest.mark.parametrize("task", prose.TASKS)
def test_prose_expected_texts_are_different_and_in_the_document(task: str) -> None:
    case = make(task)
    for turns in case.conversations:
        for turn in turns:
            assert len(set(turn.expected)) == len(turn.expected) > 0
            assert all(text in case.document for text in turn.expected)


@pytest.mark.parametrize(
    "task", ["single_needle", "multi_needle", "near_duplicates", "multi_value"]
)
def test_prose_sentences_give_the_expected_numbers_of_the_name_asked_for(task: str) -> None:
    case = make(task)
    for [turn] in case.conversations:
        asked = re.findall(r"numbers? of ([\w-]+)\?", turn.text)
        numbers = re.findall(rf"secret number of {asked[0]} is (\d+)\.", case.document)
        assert sorted(numbers) == sorted(turn.expected)


def test_prose_multi_query_asks_for_four_names_in_one_question() -> None:
    case = make("multi_query")
    for [turn] in case.conversations:
        facts = dict(re.findall(r"secret number of ([\w-]+) is (\d+)\.", case.document))
        asked = [name for name in facts if name in turn.text]
        assert sorted(facts[name] for name in asked) == sorted(turn.expected)
        assert len(asked) == 4


def test_prose_variable_tracking_chain_stands_in_order_and_has_one_number() -> None:
    case = make("variable_tracking")
    [[turn]] = case.conversations
    found = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", case.document)
    assert [name for name, _ in found] == list(turn.expected)
    assert [source for _, source in found[1:]] == list(turn.expected[:-1])
    assert found[0][1] in turn.text


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_prose_words_asked_for_are_the_most_frequent_ones(task: str) -> None:
    case = make(task)
    [[turn]] = case.conversations
    counts = Counter(line.split()[1] for line in case.document.splitlines())
    best = [word for word, _ in counts.most_common(len(turn.expected))]
    assert sorted(best) == sorted(turn.expected)
    assert counts[best[-1]] >= 3 * counts.most_common(len(best) + 1)[-1][1]


@pytest.mark.parametrize("task", ["multi_needle", "common_words"])
def test_prose_document_too_short_for_its_content_is_refused(task: str) -> None:
    with pytest.raises(ConfigError, match="100 tokens"):
        prose.TASKS[task](100, 6, random.Random(0), count)
