"""One session that requests of this replica use, or that has something to publish."""

import math
from dataclasses import dataclass

Key = tuple[str, str]
"""Tenant and session."""

Stamp = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched so that a request could begin.

    Attributes
    ----------
    num_tokens : int
        That the local store did not have.
    num_bytes : int
        Read from the object store.
    seconds : float
    """

    num_tokens: int
    num_bytes: int
    seconds: float


@dataclass(eq=False, slots=True)
class Entry:
    """What is known of one session. Guarded by the lock of ``SharedSessions``.

    Attributes
    ----------
    key : Key
    num_users : int
        Requests and other operations that are under way.
    num_left : int
        Those that have ended, ever.
    is_held : bool
        Nobody else may write it, and what is here is the newest.
    has_news : bool
        There may be something that is not published.
    is_damaged : bool
        What was published cannot be read: all of it is uploaded again.
    is_replaced : bool
        What was published is of no use here, and is replaced.
    is_due : bool
        It is about to be tended.
    publish_at_s : float
        When it is published though it is used; of ``time.monotonic``.
    stamp : tuple of float, or None
        Of the local version that was published or fetched last.
    """

    key: Key
    num_users: int = 0
    num_left: int = 0
    is_held: bool = False
    has_news: bool = False
    is_damaged: bool = False
    is_replaced: bool = False
    is_due: bool = False
    publish_at_s: float = math.inf
    stamp: Stamp | None = None
