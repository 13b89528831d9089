"""Sizes, durations and shares as they are written in a configuration."""

import math
import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from offload.config import format_size, parse_size

_SPAN: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h|d|w)")
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_NAMED: Final = (("w", 604_800), ("d", 86_400), ("h", 3_600), ("m", 60))
_SHARE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?%")


def parse_duration(value: object) -> float:
    """Read a length of time, in seconds.

    Parameters
    ----------
    value : object
        Seconds, or text such as ``"30s"``, ``"5m"``, ``"1h"``, ``"30d"``, ``"250ms"``.

    Raises
    ------
    ValueError
        Not a length of time, or negative.
    """
    if isinstance(value, str):
        found = _SPAN.fullmatch(value.strip())
        if found is not None:
            return float(found[1]) * _SECONDS[found[2]]
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is not a duration such as 30s, 5m, 1h, 30d or 2.5")
    return float(value)


def parse_duration_or_never(value: object) -> float | None:
    """Read a length of time, in seconds; -1, ``never`` and None are None."""
    if value is None or value in (-1, "-1", "never"):
        return None
    return parse_duration(value)


def format_duration(seconds: float | None) -> str | float:
    """Write a length of time so that it can be read back: ``5m``, ``2.5s``, ``never``."""
    if seconds is None:
        return "never"
    for unit, length in _NAMED:
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:.12g}s"


def parse_share(value: object) -> float:
    """Read a share between 0 and 1: a number, or text such as ``"25%"``.

    Raises
    ------
    ValueError
        Not a share.
    """
    found = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    share = float(found[1]) / 100 if found else _number(value)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(f"{value!r} is not a share such as 25% or 0.25")
    return float(share)


def parse_size_or_share(value: Any) -> int | str:
    """Read a number of bytes, or keep a share such as ``"80%"`` as text.

    Raises
    ------
    ValueError
        Neither.
    """
    if isinstance(value, str) and _SHARE.fullmatch(value.strip()):
        if not 0 < parse_share(value) <= 1:
            raise ValueError(f"{value!r} is not a size such as 64GiB or a share such as 80%")
        return value.strip()
    return parse_bytes(value)


def parse_bytes(value: Any) -> int:
    """Read a number of bytes; 0 as well."""
    number = _number(value)
    return 0 if number == 0 and not isinstance(number, bool) else parse_size(value)


def bytes_of(size: int | str, total_bytes: int) -> int:
    """Return a size in bytes; a share is one of ``total_bytes``."""
    return int(parse_share(size) * total_bytes) if isinstance(size, str) else size


def _number(value: Any) -> Any:
    """Return text as the number that it is, such as from the environment; all else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _shown_size(size: int | str) -> int | str:
    """Write a size for people, where that loses nothing."""
    if isinstance(size, str) or size == 0:
        return size
    text = format_size(size)
    return text.replace(" ", "") if parse_size(text) == size else size


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)} if len(kinds) > 1 else kinds[0])


_NUMBER: Final = {"type": "number", "minimum": 0}
_SPAN_TEXT: Final = {"type": "string", "pattern": r"^[0-9.]+ ?(ms|s|m|h|d|w)?$"}
_SIZE_TEXT: Final = {"type": "string", "pattern": r"^[0-9.]+ ?([kKmMgGtT]i?)?[bB]?$"}
_SHARE_TEXT: Final = {"type": "string", "pattern": r"^[0-9.]+ ?%$"}
_BYTES: Final = {"type": "integer", "minimum": 0}

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration),
    _schema(_SPAN_TEXT, _NUMBER),
]
DurationOrNever = Annotated[
    float | None,
    BeforeValidator(parse_duration_or_never),
    PlainSerializer(format_duration),
    _schema(_SPAN_TEXT, _NUMBER, {"enum": [-1, "never", None]}),
]
Bytes = Annotated[
    int, BeforeValidator(parse_bytes), PlainSerializer(_shown_size), _schema(_SIZE_TEXT, _BYTES)
]
BytesOrShare = Annotated[
    int | str,
    BeforeValidator(parse_size_or_share),
    PlainSerializer(_shown_size),
    _schema(_SIZE_TEXT, _SHARE_TEXT, _BYTES),
]
Share = Annotated[
    float,
    BeforeValidator(parse_share),
    _schema(_SHARE_TEXT, {"type": "number", "minimum": 0, "maximum": 1}),
]
