"""The same tasks in words, for models that read English.

Documents are passages of the packaged text with sentences put in between. Lengths are in tokens of
the model's tokenizer, to within a few of them. Shapes after RULER (arXiv 2404.06654), in words of
our own.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase

from offload.errors import ConfigError
from offload.evals.cases import Case, Turn
from offload.recall_data import corpus

CountTokens = Callable[[str], int]

_MANY, _HOPS = 40, 4
_CORRECTIONS = 3
"""Of the length of a document; each makes what is off about ten times smaller."""

_TEXT_OF_WORDS = """
anchor barley candle dagger easel ferry garnet hammer indigo jacket kettle lantern marble needle
orchid pepper quarry ribbon saddle timber umbrel velvet walnut yonder zephyr beacon copper
dahlia ember falcon goblet harbor island jigsaw kernel ladder meadow nectar olive pillar
"""
_WORDS = _TEXT_OF_WORDS.split()


def single_needle(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Hide one number in the whole document."""
    return _needles("single_needle", 1, num_tokens, 1, rng, count)


def multi_needle(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Hide many numbers; each question asks for one."""
    return _needles("multi_needle", _MANY, num_tokens, num_questions, rng, count)


def near_duplicates(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Hide numbers of names that differ in the last letter."""
    stems = rng.sample(_WORDS, _MANY // 4)
    names = [f"{stem}-{letter}" for stem in stems for letter in rng.sample(ascii_uppercase, 4)]
    return _facts("near_duplicates", names, num_tokens, num_questions, rng, count)


def multi_value(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Give every name three numbers; ask for all of them."""
    facts = {name: [_number(rng) for _ in range(3)] for name in _names(_MANY // 3, rng)}
    sentences = [_sentence(name, number) for name, numbers in facts.items() for number in numbers]
    asked = rng.sample(list(facts), min(num_questions, len(facts)))
    turns = [
        [_turn(f"What are all the secret numbers of {name}? They are", tuple(facts[name]), 40)]
        for name in asked
    ]
    return Case("multi_value", _document(sentences, num_tokens, rng, count), turns)


def multi_query(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Ask for several names in one question."""
    facts = {name: _number(rng) for name in _names(_MANY, rng)}
    document = _document([_sentence(*fact) for fact in facts.items()], num_tokens, rng, count)
    turns = []
    for _ in range(max(1, num_questions // 4)):
        asked = rng.sample(list(facts), 4)
        text = f"What are the secret numbers of {', '.join(asked[:-1])} and {asked[-1]}? They are"
        turns.append([_turn(text, tuple(facts[name] for name in asked), 60)])
    return Case("multi_query", document, turns)


def variable_tracking(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """Hide a chain of assignments; ask for all variables that end up with the number."""
    number, names = _number(rng), ["".join(rng.choices(ascii_uppercase, k=5)) for _ in range(_HOPS)]
    sentences = [f"VAR {names[0]} = {number}."]
    sentences += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    document = _document(sentences, num_tokens, rng, count, in_order=True)
    text = f"Which variables have the value {number} in the text above? They are"
    return Case("variable_tracking", document, [[_turn(text, tuple(names), 60)]])


def common_words(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """List words of which five are common; ask for these."""
    return _words("common_words", 5, 10, 3, num_tokens, rng, count)


def frequent_words(
    num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens
) -> Case:
    """List words of which three are far more frequent than the others; ask for these."""
    return _words("frequent_words", 3, 10, 1, num_tokens, rng, count)


def multi_turn(num_tokens: int, num_questions: int, rng: random.Random, count: CountTokens) -> Case:
    """Ask in turns about a shared document; the last one asks again what the first one asked."""
    case = multi_needle(num_tokens, max(2, num_questions), rng, count)
    turns = [turn for conversation in case.conversations for turn in conversation]
    return Case(
        "multi_turn",
        case.document,
        [[a, b, a] for a, b in zip(turns[::2], turns[1::2], strict=False)],
    )


TASKS: dict[str, Callable[[int, int, random.Random, CountTokens], Case]] = {
    make.__name__: make
    for make in (
        single_needle,
        multi_needle,
        near_duplicates,
        multi_value,
        multi_query,
        variable_tracking,
        common_words,
        frequent_words,
        multi_turn,
    )
}
"""By name: from tokens, questions, a generator and a tokenizer's count to a case."""


def _needles(
    task: str,
    num_facts: int,
    num_tokens: int,
    num_questions: int,
    rng: random.Random,
    count: CountTokens,
) -> Case:
    return _facts(task, _names(num_facts, rng), num_tokens, num_questions, rng, count)


def _facts(
    task: str,
    names: Sequence[str],
    num_tokens: int,
    num_questions: int,
    rng: random.Random,
    count: CountTokens,
) -> Case:
    facts = {name: _number(rng) for name in names}
    document = _document([_sentence(*fact) for fact in facts.items()], num_tokens, rng, count)
    asked = rng.sample(list(facts), min(num_questions, len(facts)))
    turns = [
        [_turn(f"What is the secret number of {name}? It is", (facts[name],), 16)] for name in asked
    ]
    return Case(task, document, turns)


def _words(
    task: str,
    num_wanted: int,
    often: int,
    seldom: int,
    num_tokens: int,
    rng: random.Random,
    count: CountTokens,
) -> Case:
    """Ask for the words that a numbered list has ``often`` times; the others it has ``seldom``."""
    wanted = rng.sample(_WORDS, num_wanted)
    per_word = count("1000. anchor\n") or 1
    num_others = (num_tokens // per_word - often * num_wanted) // seldom
    if num_others < 1:
        raise ConfigError(f"{task} does not fit into {num_tokens} tokens")
    others = _made_up(num_others, rng)
    listed = wanted * often + others * seldom
    rng.shuffle(listed)
    document = "".join(f"{number}. {word}\n" for number, word in enumerate(listed, 1))
    text = f"What are the {num_wanted} most frequent words in the list above? They are"
    return Case(task, document, [[_turn(text, tuple(wanted), 60)]])


def _made_up(count: int, rng: random.Random) -> list[str]:
    """Return different words that are none, so that a list of any length has enough of them."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(ascii_lowercase, k=6))] = None
    return list(words)


def _turn(question: str, expected: tuple[str, ...], max_tokens: int) -> Turn:
    text = f"\n\nQuestion: {question}"
    return Turn(text, expected, starts=False, max_tokens=max_tokens, stop="\n")


def _names(count: int, rng: random.Random) -> list[str]:
    """Return different names, such as ``amber-otter``."""
    pairs = [(first, last) for first in _WORDS for last in _WORDS if first != last]
    return [f"{first}-{last}" for first, last in rng.sample(pairs, count)]


def _number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _sentence(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def _document(
    sentences: list[str],
    num_tokens: int,
    rng: random.Random,
    count: CountTokens,
    *,
    in_order: bool = False,
) -> str:
    """Return a passage with sentences at random places between its words."""
    text = corpus("heldout") + corpus("train")
    start = rng.randrange(len(text))
    text = text[start:] + text[:start]
    if not in_order:
        rng.shuffle(sentences)
    places = sorted(rng.random() for _ in sentences)
    num_chars = max(0, 4 * num_tokens - sum(map(len, sentences)))
    for _ in range(_CORRECTIONS):
        document = _woven(text[:num_chars], sentences, places)
        found = count(document)
        num_chars += round((num_tokens - found) * len(document) / found)
        if not 0 <= num_chars <= len(text):
            raise ConfigError(
                f"{len(sentences)} sentences and {len(text)} characters of text do not make "
                f"{num_tokens} tokens"
            )
    return _woven(text[:num_chars], sentences, places)


def _woven(text: str, sentences: Sequence[str], places: Sequence[float]) -> str:
    pieces, previous = [], 0
    for sentence, place in zip(sentences, places, strict=True):
        cut = text.find(" ", max(previous, int(place * len(text))))
        cut = len(text) if cut < 0 else cut
        pieces += [text[previous:cut], " ", sentence]
        previous = cut
    return "".join([*pieces, text[previous:]])
