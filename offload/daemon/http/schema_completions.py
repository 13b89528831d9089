"""Bodies of ``/v1/completions``."""

from typing import Annotated, Literal

from pydantic import Field

from offload.daemon.http.schema_chat import ChatUsage, StreamOptions
from offload.daemon.http.schema_common import Count, Reply, SamplingFields, TokenId

MAX_PROMPTS = 256

TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """Texts, or tokens, to be continued."""

    prompt: Prompts
    max_tokens: Count | None = 16
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=0, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool = True


class CompletionLogprobs(Reply):
    """Log-probabilities of the tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None


class CompletionReply(Reply):
    """What ``/v1/completions`` answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: ChatUsage
