"""Multiple choice: letters, texts and places, and which of them a reply means. Pure functions."""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_uppercase, punctuation

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_NUMBERS |= {"seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12}

_DIGITS = re.compile(r"[0-9]{1,9}")
_PRINTED = re.compile(r"\(?([A-Z])[.):]\s*")
_MARK = "[.):,;\\]}。、]"
# Each finds one letter; the first that finds one in a reply decides. Small letters need a mark of
# their own next to them, because "a" is also a word; so are the capitals A and I.
_CAPITAL = r"[B-HJ-Z](?!\w)|[AI](?!\w|\s+(?!because\b)[a-z])"
_WHOLE = re.compile(r"^\W*([A-Za-z])\W*$")
_LEADING = re.compile(rf"^(?:[(\[{{]\s*([A-Za-z])(?!\w)|\W*([A-Za-z])\s?{_MARK}(?=\s|$))")
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|would\s+be|should\s+be))?)\W*"
    rf"(?:(?<=[(\[{{])([A-Za-z])(?!\w)|({_CAPITAL})|([a-z])(?=\s?{_MARK}|\s*$))"
)
_LEAD = re.compile(r"(?i)^(?:the )?(?:best |correct |right )?(?:answer|option|choice)(?: is)?:? ")
_LETTERED = re.compile(r"^\W*([A-Za-z])\W+(.+)$", re.DOTALL)
_BARE = re.compile(rf"^\W*({_CAPITAL})")
_ENCLOSED = re.compile(r"[(\[{]\s*([A-Za-z])\s*[)\]}]")


def letter_of(place: int) -> str:
    """Return ``"A"`` for 0, ``"B"`` for 1; there are 26."""
    return ascii_uppercase[place]


def place_of(answer: str | int, choices: Sequence[str]) -> int | None:
    """Return which choice an annotation means by its text, its letter or its place.

    Parameters
    ----------
    answer : str or int
        The text decides where it is among the choices: of letters in a shop sign, for example.
    choices : sequence of str

    Returns
    -------
    int or None
        From 0; of equal choices the first. None: there is no such choice.
    """
    if isinstance(answer, int):
        return answer if 0 <= answer < len(choices) else None
    if answer in choices:
        return choices.index(answer)
    bare = answer.strip()
    stripped = [choice.strip() for choice in choices]
    if bare in stripped:
        return stripped.index(bare)
    printed = _PRINTED.fullmatch(bare)
    return _place(printed[1] if printed else bare, choices)


def plain_choices(options: Sequence[str]) -> tuple[str, ...]:
    """Return options without ``"A. "``, ``"(B) "``, … where all have their own letter in front."""
    printed = [_PRINTED.match(option) for option in options]
    letters = [match[1] if match else "" for match in printed]
    if letters != list(ascii_uppercase[: len(options)]):
        return tuple(options)
    return tuple(without_letter(option) for option in options)


def printed_letter(option: str) -> str | None:
    """Return the letter that an option has in front: ``"B"`` of ``"B. red"``."""
    match = _PRINTED.match(option)
    return match[1] if match else None


def without_letter(option: str) -> str:
    """Return ``"red"`` of ``"B. red"``; an option without a letter as it is."""
    return _PRINTED.sub("", option, count=1).strip() if _PRINTED.match(option) else option


def normalised(text: str) -> str:
    """Return words only: lower case, no punctuation, no articles, single spaces."""
    letters = unicodedata.normalize("NFKC", text).lower()
    words = "".join(" " if letter in punctuation else letter for letter in letters).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def parse_choice(reply: str, choices: Sequence[str]) -> int | None:
    """Return which choice a model means.

    In this order: the reply is the text of a choice, with or without its letter; it is a letter,
    begins with one (``"C."``, ``"c) red"``, ``"(C"``) or says which is the answer (``"Best option:
    (C"``); it has one letter in brackets; it has the text of one choice in it, or is the beginning
    of one; it begins with a capital that stands alone.

    Parameters
    ----------
    reply : str
        What was generated; reasoning, from ``<think>`` to ``</think>``, does not count.
    choices : sequence of str

    Returns
    -------
    int or None
        From 0; of equal choices the first. None: no choice, or more than one, is meant.
    """
    said = unicodedata.normalize("NFKC", _conclusion(reply)).replace("**", "").strip()
    texts = [normalised(choice) for choice in choices]
    place = _by_whole_text(said, choices, texts)
    for pattern in (_WHOLE, _LEADING, _NAMED):
        if place is None:
            place = _place(_letter(pattern.search(said)), choices)
    if place is not None:
        return place
    enclosed = {_place(letter, choices) for letter in _ENCLOSED.findall(said)} - {None}
    if len(enclosed) == 1:
        return enclosed.pop()
    place = _by_part_of_text(normalised(said), texts)
    return _place(_letter(_BARE.search(said)), choices) if place is None else place


def parse_yes_no(reply: str) -> bool | None:
    """Return whether a reply begins with yes or no, or has only one of the two in it."""
    words = normalised(_conclusion(reply)).split()
    said = [word == "yes" for word in words if word in ("yes", "no")]
    if words and words[0] in ("yes", "no"):
        return said[0]
    return said[0] if len(set(said)) == 1 else None


def parse_count(reply: str) -> int | None:
    """Return the only whole number in a reply, in digits or, to twelve, in words."""
    words = normalised(_conclusion(reply)).split()
    numbers = {int(word) for word in words if _DIGITS.fullmatch(word)}
    numbers |= {_NUMBERS[word] for word in words if word in _NUMBERS}
    return numbers.pop() if len(numbers) == 1 else None


def _by_whole_text(said: str, choices: Sequence[str], texts: Sequence[str]) -> int | None:
    if _WHOLE.match(said):
        return None
    if said in choices:
        return choices.index(said)
    body = normalised(_LEAD.sub("", said, count=1))
    if body and body in texts:
        return texts.index(body)
    lettered = _LETTERED.match(said)
    place = _place(lettered[1], choices) if lettered else None
    if lettered is None or place is None:
        return None
    return place if normalised(lettered[2]) == texts[place] else None


def _by_part_of_text(words: str, texts: Sequence[str]) -> int | None:
    inside = [text for text in texts if text and f" {text} " in f" {words} "]
    longest = max(inside, key=len, default="")
    if longest and all(text in longest for text in inside):
        return texts.index(longest)
    begun = {text for text in texts if words and text.startswith(words)}
    return texts.index(begun.pop()) if len(begun) == 1 and not inside else None


def _conclusion(reply: str) -> str:
    return reply.rpartition("</think>")[2].partition("<think>")[0]


def _letter(match: re.Match[str] | None) -> str:
    return next(filter(None, match.groups())) if match else ""


def _place(letter: str, choices: Sequence[str]) -> int | None:
    place = ascii_uppercase.find(letter.upper()) if len(letter) == 1 else -1
    return place if 0 <= place < len(choices) else None
