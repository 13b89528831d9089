import random
import re
from collections import Counter

import pytest

from offload.errors import ConfigError
from offload.evals import records
from offload.evals.cases import PREVIOUS, Case
from offload.evals.tasks import make_cases

_TOKENS = 4096
_RECORD = re.compile(r"\n\[(\w+):(\d+)\]")


def make(task: str, seed: int = 0, num_tokens: int = _TOKENS) -> Case:
    return records.TASKS[task](num_tokens, 6, random.Random(seed))


@pytest.mark.parametrize("task", records.TASKS)
def test_records_case_of_the_same_seed_is_the_same_and_of_another_is_not(task: str) -> None:
    assert make(task) == make(task)
    assert make(task) != make(task, seed=1)


@pytest.mark.parametrize("task", records.TASKS)
@pytest.mark.parametrize("num_tokens", [2048, 16384])
def test_records_document_has_the_length_asked_for_besides_its_first_token(
    task: str, num_tokens: int
) -> None:
    assert len(make(task, num_tokens=num_tokens).document.encode()) == num_tokens - 1


@pytest.mark.parametrize(
    "task", ["single_needle", "multi_needle", "near_duplicates", "multi_value"]
)
def test_records_answer_to_a_question_stands_once_in_the_document(task: str) -> None:
    case = make(task)
    for [turn] in case.conversations:
        assert case.document.count(turn.text + turn.expected[0]) == 1


def test_records_single_needle_hides_one_record() -> None:
    case = make("single_needle")
    assert len(_RECORD.findall(case.document)) == len(case.conversations) == 1


def test_records_near_duplicates_have_a_neighbour_one_letter_away() -> None:
    case = make("near_duplicates")
    keys = [key for key, _ in _RECORD.findall(case.document)]
    for [turn] in case.conversations:
        asked = turn.text[2:6]
        distances = [sum(a != b for a, b in zip(asked, key, strict=True)) for key in keys]
        assert distances.count(0) == 1
        assert 1 in distances


def test_records_multi_value_keys_have_three_values_of_different_first_digits() -> None:
    values: dict[str, set[str]] = {}
    for key, value in _RECORD.findall(make("multi_value").document):
        values.setdefault(key, set()).add(value[0])
    assert set(map(len, values.values())) == {3}


def test_records_variable_tracking_followed_hop_by_hop_ends_at_the_expected_value() -> None:
    case = make("variable_tracking")
    value_of = dict(_RECORD.findall(case.document))
    assert len(case.conversations) == 6
    for turns in case.conversations:
        previous = ""
        for turn in turns:
            key = turn.text.replace(PREVIOUS, previous)[2:-1]
            previous = value_of[key]
        assert turns[-1].expected == (f"{previous}]",)
        assert previous not in value_of


@pytest.mark.parametrize("task", ["frequent_values", "common_values"])
def test_records_most_frequent_value_of_a_key_is_the_right_one(task: str) -> None:
    case = make(task)
    found = Counter(_RECORD.findall(case.document))
    for [turn] in case.conversations:
        counts = {value: n for (key, value), n in found.items() if key == turn.text[2:6]}
        assert f"{max(counts, key=lambda value: counts[value])}]" == turn.expected[0]
        assert sorted(counts.values())[-2:] != [6, 6]


def test_records_multi_turn_tells_something_between_two_questions() -> None:
    case = make("multi_turn")
    for first, told, last in case.conversations:
        assert first.text + first.expected[0] in case.document
        assert last.text + last.expected[0] in case.document
        record, question = told.text[: told.text.index("]") + 1], told.text.split("]")[1]
        assert record == question + told.expected[0]


def test_records_document_too_short_for_its_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="do not make 100 tokens"):
        records.common_values(100, 1, random.Random(0))


def test_make_cases_makes_documents_until_there_are_enough_answers_or_documents() -> None:
    needles = make_cases(records.single_needle, 1024, 3, 4, 0)
    assert len(needles) == 3
    assert len({case.document for case in needles}) == 3
    assert len(make_cases(records.single_needle, 1024, 9, 4, 0)) == 4
    assert len(make_cases(records.multi_needle, 2048, 9, 4, 0)) == 1
