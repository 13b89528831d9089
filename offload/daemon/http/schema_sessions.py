"""Bodies of ``/v1/sessions``."""

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field

from offload.daemon.http.schema_chat import BySource, ChatMessage, Tool
from offload.daemon.http.schema_common import MAX_TOKENS, OpenBody, Reply, TokenId
from offload.daemon.state import Explanation, SessionView

Name = Annotated[str, Field(min_length=1, max_length=128)]
Seconds = Annotated[float, Field(gt=0, le=1e10)]


class CreateRequest(OpenBody):
    """A session to be made."""

    name: Name
    ttl_s: Seconds | None = None
    pin: bool = False


class PatchRequest(OpenBody):
    """What is to change; ``ttl_s: null`` keeps a session for ever."""

    pin: bool | None = None
    ttl_s: Seconds | None = None


class ForkRequest(OpenBody):
    """A session that begins like another."""

    name: Name
    at_token: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None


class EvictRequest(OpenBody):
    """How far down a session goes."""

    to: Literal["host", "disk"] = "disk"


class ExplainRequest(OpenBody):
    """A prompt that should have been known."""

    prompt: str | list[TokenId] | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None


class SessionReply(Reply):
    """A session. Times are seconds since 1970."""

    id: str
    object: Literal["session"]
    num_tokens: int
    tokens: BySource
    size_bytes: int
    dirty_tokens: int
    state: str
    is_pinned: bool
    ttl_s: float | None
    expires_s: float | None
    created_s: float
    last_used_s: float
    parent: str | None
    last_hit_share: float
    num_requests: int


class SessionList(Reply):
    """All sessions of a tenant."""

    object: Literal["list"]
    data: list[SessionReply]


class ExplainReply(Reply):
    """Where a prompt leaves what a session has, and why."""

    num_common_tokens: int
    num_session_tokens: int
    num_prompt_tokens: int
    session_text: str
    prompt_text: str
    split_at: int
    reason: str
    miss: str | None


def session_reply(view: SessionView) -> SessionReply:
    """Return a session as it is shown."""
    return SessionReply(
        id=view.name,
        object="session",
        num_tokens=view.num_tokens,
        tokens=BySource(**asdict(view.tokens)),
        size_bytes=view.size_bytes,
        dirty_tokens=view.dirty_tokens,
        state=view.state,
        is_pinned=view.is_pinned,
        ttl_s=view.ttl_s,
        expires_s=view.expires_s,
        created_s=view.created_s,
        last_used_s=view.last_used_s,
        parent=view.parent,
        last_hit_share=view.last_hit_share,
        num_requests=view.num_requests,
    )


def explain_reply(found: Explanation) -> ExplainReply:
    """Return an explanation as it is shown."""
    return ExplainReply(
        num_common_tokens=found.num_common_tokens,
        num_session_tokens=found.num_session_tokens,
        num_prompt_tokens=found.num_prompt_tokens,
        session_text=found.session_text,
        prompt_text=found.prompt_text,
        split_at=found.split_at,
        reason=found.reason,
        miss=found.miss,
    )
