"""Reading JSON that others wrote: every error names the file, the entry and the field."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from offload.errors import ConfigError

Span = tuple[float, float]
"""Seconds from and to."""

_SHOWN_LETTERS = 60
_LARGEST = 1e12

_Value = TypeVar("_Value")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; a byte-order mark is dropped.

    Raises
    ------
    ConfigError
        There is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} is {error.reason}") from error


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text.

    Raises
    ------
    ConfigError
        It is not JSON; the message says ``where``, line and column.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{where} is not JSON: {error.msg} at {place}") from error


def read_objects(path: Path) -> "list[Fields]":
    """Return the entries of a file that holds a JSON list of objects."""
    return as_objects(parse_json(read_text(path), str(path)), str(path))


def parse_lines(text: str, where: str) -> "list[Fields]":
    """Return the objects of JSONL, one on a line; empty lines do not matter."""
    # Not splitlines: a text in JSON may have other characters that end lines.
    return [
        _as_object(parse_json(line, f"{where}, line {number}"), f"{where}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def as_objects(value: object, where: str) -> "list[Fields]":
    """Return the entries of a list of objects, each named by its place in it, from 0."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list of objects, found {_shown(value)}")
    return [_as_object(entry, f"{where}: entry {place}") for place, entry in enumerate(value)]


def clock_s(text: str) -> float:
    """Return the seconds of ``"90"``, ``"1:30"``, ``"00:01:30"`` or ``"1:30.5"``.

    Only the last part may have a fraction. A part may be larger than 59, as in files that
    benchmarks ship; each is worth sixty of the next.

    Raises
    ------
    ValueError
        It is none of these.
    """
    *whole, last = text.strip().split(":")
    if len(whole) > 2 or not all(map(_is_digits, whole)):
        raise ValueError(f"{text!r} is no time such as 90, 1:30 or 0:01:30")
    if not _is_digits(last.replace(".", "", 1)):
        raise ValueError(f"{text!r} is no time such as 90, 1:30 or 0:01:30")
    minutes = 0
    for part in whole:
        minutes = minutes * 60 + int(part)
    return minutes * 60 + float(last)


@dataclass(frozen=True, slots=True)
class Fields:
    """An object out of a JSON file that knows where it stood.

    Every method raises ConfigError, naming ``where`` and the field, if the field is not there or
    not of that kind.

    Attributes
    ----------
    values : dict
        The object itself, not a copy.
    where : str
        File and entry.
    """

    values: dict[str, Any]
    where: str

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def optional(self, read: Callable[[str], _Value], name: str) -> _Value | None:
        """Return ``read(name)``, or None where the field is missing or null."""
        return read(name) if self.has(name) else None

    def text(self, name: str) -> str:
        """Return a string that is not blank."""
        value = self._value(name)
        if isinstance(value, str) and value.strip():
            return value
        raise self.wrong(name, "a text")

    def string(self, name: str) -> str:
        """Return a string, which may be empty."""
        value = self._value(name)
        if isinstance(value, str):
            return value
        raise self.wrong(name, "a text")

    def real(self, name: str) -> float:
        """Return a number of either sign."""
        value = self._value(name)
        if _is_number(value):
            return float(value)
        raise self.wrong(name, "a number")

    def number(self, name: str) -> float:
        """Return a number that is finite and not negative."""
        value = self._value(name)
        if _is_number(value) and value >= 0:
            return float(value)
        raise self.wrong(name, "a number that is not negative")

    def integer(self, name: str) -> int:
        """Return a whole number that is not negative."""
        value = self._value(name)
        if _is_number(value) and isinstance(value, int) and value >= 0:
            return value
        raise self.wrong(name, "a whole number that is not negative")

    def time_s(self, name: str) -> float:
        """Return seconds, from a number or from a text as in ``clock_s``."""
        value = self._value(name)
        if not isinstance(value, str):
            return self.number(name)
        try:
            return clock_s(value)
        except ValueError as error:
            raise self.wrong(name, "a time such as 90 or 0:01:30") from error

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings, blank ones among them."""
        value = self._value(name)
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise self.wrong(name, "a list of texts")

    def spans(self, name: str) -> tuple[Span, ...]:
        """Return a list of pairs of seconds, the second not before the first."""
        value = self._value(name)
        if isinstance(value, list) and all(map(_is_span, value)):
            return tuple((float(start), float(end)) for start, end in value)
        raise self.wrong(name, "a list of pairs of seconds, from and to")

    def objects(self, name: str) -> "list[Fields]":
        """Return a list of objects."""
        value = self._value(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of objects")
        return [_as_object(entry, f"{self.where}, {name} {n}") for n, entry in enumerate(value)]

    def nested(self, name: str) -> "Fields":
        """Return an object."""
        value = self._value(name)
        if isinstance(value, dict):
            return Fields(value, f"{self.where}, {name}")
        raise self.wrong(name, "an object")

    def numbers(self, name: str) -> dict[str, float]:
        """Return an object of numbers that are not negative."""
        inner = self.nested(name)
        return {key: inner.number(key) for key in inner.values}

    def wrong(self, name: str, expected: str) -> ConfigError:
        """Make the error for a field that is not what was expected."""
        found = _shown(self.values[name]) if name in self.values else "no such field"
        return ConfigError(f"{self.where}, field {name!r}: expected {expected}, found {found}")

    def _value(self, name: str) -> Any:
        return self.values.get(name)


def _as_object(value: object, where: str) -> Fields:
    if isinstance(value, dict):
        return Fields(value, where)
    raise ConfigError(f"{where}: expected an object, found {_shown(value)}")


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_number(value: object) -> bool:
    # For Python, true is a number, and its JSON has NaN and infinities.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -_LARGEST <= value <= _LARGEST


def _is_span(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)):
        return False
    return bool(0 <= value[0] <= value[1])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}…"
