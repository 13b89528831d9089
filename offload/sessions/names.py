"""Names and lifetimes of sessions, as users give them."""

import math
import re
import time

from offload.errors import ConfigError

MAX_NAME_CHARS = 128
_NAME = re.compile(r"[\w][\w .:@+=,-]*", re.ASCII)


def check_name(name: object) -> str:
    """Return a session's name, or raise ConfigError saying what is wrong with it.

    Names are ASCII letters, digits and ``_ . : @ + = , -`` and blanks, and start with a letter,
    digit or underscore. They are keys of the catalog, never parts of a path.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name != name.strip():
        raise ConfigError(
            f"{name!r} is no name for a session; use letters, digits and any of '_ .:@+=,-', "
            "starting with a letter, digit or '_'"
        )
    if len(name) > MAX_NAME_CHARS:
        raise ConfigError(f"a name of {len(name)} characters; at most {MAX_NAME_CHARS}")
    return name


def expiry(ttl_s: float | None) -> float | None:
    """Return when something that lives so many seconds from now ends; None is never.

    Raises
    ------
    ConfigError
        Not a positive, finite number.
    """
    if ttl_s is None:
        return None
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float):
        raise ConfigError(f"a time to live is a number of seconds or None, not {ttl_s!r}")
    if not 0 < ttl_s < math.inf:
        raise ConfigError(f"a time to live is a positive number of seconds, not {ttl_s}")
    return time.time() + ttl_s
