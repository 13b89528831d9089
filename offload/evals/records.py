"""Tasks in the language of the recall model: records such as ``[qmzk:48213]`` in real text.

The shapes are those of RULER (arXiv 2404.06654) and SCBench (arXiv 2412.10319), said in the one
sentence that the model knows: it is given the beginning of a record and has to finish it.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from string import ascii_lowercase, digits
from typing import TypeVar

from offload.errors import ConfigError
from offload.evals.cases import PREVIOUS, Case, Turn
from offload.recall_data import KEY_LETTERS, VALUE_DIGITS, corpus

_TOKENS_PER_RECORD = 100
_HOPS, _CHAIN_DIGITS = 3, 5
_OFTEN, _SELDOM = 6, 2
_MANY_OTHERS = 5

_Item = TypeVar("_Item")


def single_needle(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Hide one record in the whole document."""
    key, value = _keys(1, rng)[0], _value(rng)
    return Case(
        "single_needle", _document([_record(key, value)], num_tokens, rng), [[_ask(key, value)]]
    )


def multi_needle(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Hide a record in every hundred tokens; each question asks for one."""
    facts = {key: _value(rng) for key in _keys(num_tokens // _TOKENS_PER_RECORD, rng)}
    document = _document([_record(*fact) for fact in facts.items()], num_tokens, rng)
    asked = rng.sample(list(facts), min(num_questions, len(facts)))
    return Case("multi_needle", document, [[_ask(key, facts[key])] for key in asked])


def near_duplicates(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Hide as many records, but every key has others that differ in one letter."""
    keys: dict[str, None] = {}
    while len(keys) < num_tokens // _TOKENS_PER_RECORD:
        stem = _keys(1, rng)[0]
        place = rng.randrange(KEY_LETTERS)
        for letter in rng.sample(ascii_lowercase, 4):
            keys[stem[:place] + letter + stem[place + 1 :]] = None
    facts = {key: _value(rng) for key in keys}
    document = _document([_record(*fact) for fact in facts.items()], num_tokens, rng)
    asked = rng.sample(list(facts), min(num_questions, len(facts)))
    return Case("near_duplicates", document, [[_ask(key, facts[key])] for key in asked])


def multi_value(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Give every key three values; a question has the first digit of one of them."""
    records, asked = [], []
    for key in _keys(num_tokens // _TOKENS_PER_RECORD // 3, rng):
        for first in rng.sample(digits, 3):
            value = first + _value(rng)[1:]
            records.append(_record(key, value))
            asked.append(Turn(f"\n[{key}:{first}", (f"{value[1:]}]",)))
    document = _document(records, num_tokens, rng)
    return Case("multi_value", document, [[turn] for turn in _some(asked, num_questions, rng)])


def multi_query(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Ask all questions in one conversation, one after the other."""
    case = multi_needle(num_tokens, num_questions, rng)
    turns = [turn for conversation in case.conversations for turn in conversation]
    return Case("multi_query", case.document, [turns])


def variable_tracking(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Make the value of a record the key of another one; only the last of the chain counts."""
    num_chains = max(1, num_tokens // _TOKENS_PER_RECORD // (_HOPS + 1))
    # Of digits, keys too: the model has learnt to answer with digits only.
    keys = iter(f"{n:0{_CHAIN_DIGITS}}" for n in _numbers(num_chains * (_HOPS + 1), rng))
    chains = [[next(keys) for _ in range(_HOPS + 1)] for _ in range(num_chains)]
    records = [_record(a, b) for chain in chains for a, b in pairwise(chain)]
    conversations = []
    for chain in _some(chains, num_questions, rng):
        hops = [Turn(f"\n[{chain[0]}:", ())]
        hops += [Turn(f"\n[{PREVIOUS}:", ()) for _ in range(_HOPS - 2)]
        conversations.append([*hops, Turn(f"\n[{PREVIOUS}:", (f"{chain[-1]}]",))])
    return Case("variable_tracking", _document(records, num_tokens, rng), conversations)


def frequent_values(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Give every key one value six times and another one twice; the frequent one is right."""
    return _frequency("frequent_values", [_SELDOM], num_tokens, num_questions, rng)


def common_values(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Give every key one value six times and five others once; the common one is right."""
    return _frequency("common_values", [1] * _MANY_OTHERS, num_tokens, num_questions, rng)


def multi_turn(num_tokens: int, num_questions: int, rng: random.Random) -> Case:
    """Ask in turns about a shared document; between them, tell a record and ask for it."""
    case = multi_needle(num_tokens, max(2, num_questions), rng)
    turns = [turn for conversation in case.conversations for turn in conversation]
    conversations = []
    for first, last in zip(turns[::2], turns[1::2], strict=False):
        key, value = _keys(1, rng)[0], _value(rng)
        told = Turn(f"{_record(key, value)}\n[{key}:", (f"{value}]",))
        conversations.append([first, told, last])
    return Case("multi_turn", case.document, conversations)


TASKS: dict[str, Callable[[int, int, random.Random], Case]] = {
    make.__name__: make
    for make in (
        single_needle,
        multi_needle,
        near_duplicates,
        multi_value,
        multi_query,
        variable_tracking,
        frequent_values,
        common_values,
        multi_turn,
    )
}
"""By name: from tokens, questions and a generator to a case."""


def _frequency(
    task: str, others: Sequence[int], num_tokens: int, num_questions: int, rng: random.Random
) -> Case:
    per_key = _OFTEN + sum(others)
    records, turns = [], []
    for key in _keys(max(1, num_tokens // _TOKENS_PER_RECORD // per_key), rng):
        firsts = rng.sample(digits, 1 + len(others))
        values = [first + _value(rng)[1:] for first in firsts]
        for value, count in zip(values, [_OFTEN, *others], strict=True):
            records += [_record(key, value)] * count
        turns.append(_ask(key, values[0]))
    rng.shuffle(records)
    document = _document(records, num_tokens, rng)
    return Case(task, document, [[turn] for turn in _some(turns, num_questions, rng)])


def _ask(key: str, value: str) -> Turn:
    return Turn(f"\n[{key}:", (f"{value}]",))


def _record(key: str, value: str) -> str:
    return f"\n[{key}:{value}]"


def _keys(count: int, rng: random.Random) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(rng.choices(ascii_lowercase, k=KEY_LETTERS))] = None
    return list(keys)


def _value(rng: random.Random) -> str:
    return "".join(rng.choices(digits, k=rng.choice(VALUE_DIGITS)))


def _numbers(count: int, rng: random.Random) -> list[int]:
    return rng.sample(range(10**_CHAIN_DIGITS), count)


def _some(items: Sequence[_Item], count: int, rng: random.Random) -> list[_Item]:
    return rng.sample(list(items), min(count, len(items)))


def _document(records: Sequence[str], num_tokens: int, rng: random.Random) -> str:
    """Return text of so many tokens, the first one apart, with records at random places."""
    num_text = num_tokens - 1 - sum(map(len, records))
    text = corpus("heldout")
    if not 0 <= num_text <= len(text):
        raise ConfigError(
            f"{len(records)} records and {num_text} bytes of text do not make {num_tokens} tokens"
        )
    start = rng.randrange(len(text))
    passage = (text + text)[start : start + num_text]
    cuts = sorted(rng.randint(0, num_text) for _ in records)
    pieces, previous = [], 0
    for record, cut in zip(records, cuts, strict=True):
        pieces += [passage[previous:cut], record]
        previous = cut
    return "".join([*pieces, passage[previous:]])
