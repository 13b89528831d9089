"""Which session a request says it belongs to.

The answer is a hint, for retention, listing and quota. It decides nothing about which keys and
values are used: that is found by comparing tokens, inside the tenant.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .:@+=,-]{0,127}", re.ASCII)
"""What the session store takes for a name."""

_LEGACY_USER_ID = re.compile(r"_session_([0-9a-fA-F-]{8,64})$")


def session_hint(
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    id_headers: Sequence[str] = (),
    previous_session: str | None = None,
) -> str | None:
    """Return the name of the session a request is of, or None if it does not say.

    The first of these that is there: ``session_id`` of the body, ``conversation``, the session of
    ``previous_response_id``, ``X-Session-ID``, ``vllm_xargs.session_id``, the further headers,
    ``metadata.user_id`` as Claude Code writes it, ``prompt_cache_key``, which is the weakest
    because forks of a conversation may share it.

    Parameters
    ----------
    body : mapping
        The request's JSON.
    headers : mapping of str to str
    id_headers : sequence of str
        Asked in this order; case, ``-`` and ``_`` make no difference.
    previous_session : str or None
        Session of the response that ``previous_response_id`` names.

    Returns
    -------
    str or None
        A name as the session store takes it; what is no such name is replaced by its digest.
    """
    folded = {_fold(name): value for name, value in headers.items()}
    candidates = (
        body.get("session_id"),
        _conversation(body.get("conversation")),
        previous_session,
        folded.get(_fold("X-Session-ID")),
        _member(body.get("vllm_xargs"), "session_id"),
        *(folded.get(_fold(name)) for name in id_headers),
        _session_of_user(_member(body.get("metadata"), "user_id")),
        body.get("prompt_cache_key"),
    )
    return next((name for name in map(clean_name, candidates) if name is not None), None)


def clean_name(name: object) -> str | None:
    """Return what a client calls a session, fit to be stored; None if it is nothing."""
    if not isinstance(name, str) or not (stripped := name.strip()):
        return None
    if _NAME.fullmatch(stripped):
        return stripped
    digest = hashlib.blake2b(stripped.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return f"digest-{digest}"


def _fold(name: str) -> str:
    # nginx and load balancers rewrite one into the other.
    return name.lower().replace("_", "-")


def _member(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def _conversation(value: object) -> object:
    return value if isinstance(value, str) else _member(value, "id")


def _session_of_user(user_id: object) -> object:
    """Read the session out of Claude Code's ``metadata.user_id``: JSON, or text of a fixed form."""
    if not isinstance(user_id, str):
        return None
    if found := _LEGACY_USER_ID.search(user_id):
        return found.group(1)
    if not user_id.startswith("{"):
        return None
    try:
        return _member(json.loads(user_id), "session_id")
    except (ValueError, RecursionError):
        return None  # some other user's id, not a session
