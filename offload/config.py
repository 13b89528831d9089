"""Sizes as people write them. Knows no tier and no machine."""

import re
from fractions import Fraction
from typing import Final

from offload.errors import ConfigError

_UNITS: Final = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
}
_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgt]i?)?b?", re.IGNORECASE)
_MAX_BYTES: Final = 2**63 - 1
_ACCEPTED: Final = "a positive int of bytes, or text such as '2GiB', '1.5 GB', '512MiB', '64k'"


def parse_size(value: int | str) -> int:
    """Read a number of bytes.

    Parameters
    ----------
    value : int or str
        Bytes, or a number with a unit. The ``i`` decides: ``KiB, MiB, GiB, TiB`` (or ``Ki`` …) are
        powers of 1024; ``kB, MB, GB, TB`` (or ``k`` …) are powers of 1000. Case and the final
        ``B`` do not matter.

    Returns
    -------
    int
        Bytes, from 1 to ``2**63 - 1``. A fraction of a byte is dropped.

    Raises
    ------
    ConfigError
        The value is no size: another type (``bool`` and ``float`` included), an unknown unit, zero,
        negative, not a number, or more than a file or an address can count.
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise _not_a_size(value)
        number, unit = match.groups(default="")
        num_bytes = int(Fraction(number) * _UNITS[unit.lower()])
    elif isinstance(value, int) and not isinstance(value, bool):
        num_bytes = value
    else:
        raise _not_a_size(value)
    if not 0 < num_bytes <= _MAX_BYTES:
        raise _not_a_size(value)
    return num_bytes


def format_size(num_bytes: int) -> str:
    """Write a number of bytes for people, in powers of 1024: ``1.5 GiB``, ``512 MiB``, ``100 B``.

    Parameters
    ----------
    num_bytes : int
        Not negative.

    Returns
    -------
    str
        At most one decimal, none where it would be zero; ``parse_size`` reads it back.
    """
    size = float(num_bytes)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # 1023.95 would print as "1024.0", which is one of the next unit.
        if size < 1023.95:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"


def _not_a_size(value: object) -> ConfigError:
    return ConfigError(f"{value!r} ({type(value).__name__}) is not a size; accepted: {_ACCEPTED}")
