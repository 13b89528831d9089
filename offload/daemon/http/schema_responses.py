"""Bodies of ``/v1/responses`` and ``/v1/conversations``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from offload.daemon.http.schema_chat import KvUsage, PromptDetails
from offload.daemon.http.schema_common import Count, OpenBody, Reply, SamplingFields

MAX_ITEMS = 100_000
Item = dict[str, Any]


class ConversationName(OpenBody):
    """Names a conversation."""

    id: str


class TextFormat(OpenBody):
    """What the answer has to fit."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(OpenBody):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesInput(SamplingFields):
    """What a response would answer."""

    input: str | Annotated[list[Item], Field(max_length=MAX_ITEMS)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationName | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def conversation_id(self) -> str | None:
        """The conversation that is continued."""
        named = self.conversation
        return named.id if isinstance(named, ConversationName) else named


class ResponsesRequest(ResponsesInput):
    """What a response answers, and what becomes of it."""

    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    store: bool | None = None
    background: bool | None = None
    user: str | None = None

    @property
    def is_stored(self) -> bool:
        """Whether it can be asked for later."""
        return self.store is not False or bool(self.background)

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported; None: no log-probabilities."""
        is_wanted = "message.output_text.logprobs" in (self.include or ())
        return (self.top_logprobs or 0) if is_wanted or self.top_logprobs else None


class OutputDetails(Reply):
    """Of the generated tokens, those of reasoning; they are not told apart."""

    reasoning_tokens: int


class ResponsesUsage(Reply):
    """What a response took."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    kv: KvUsage


class ResponseReply(Reply):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    tools: list[dict[str, Any]]
    usage: ResponsesUsage | None


class InputTokensReply(Reply):
    """How long a prompt would be."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ItemList(Reply):
    """A page of items."""

    object: Literal["list"]
    data: list[Item]
    first_id: str
    last_id: str
    has_more: bool


class DeletedReply(Reply):
    """Something is gone."""

    id: str
    object: str
    deleted: Literal[True]


class ConversationRequest(OpenBody):
    """A conversation to be made."""

    items: Annotated[list[Item], Field(max_length=MAX_ITEMS)] | None = None
    metadata: dict[str, Any] | None = None


class MetadataRequest(OpenBody):
    """New metadata of a conversation."""

    metadata: dict[str, Any] | None = None


class ItemsRequest(OpenBody):
    """Items for a conversation."""

    items: Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class ConversationReply(Reply):
    """A conversation."""

    id: str
    object: Literal["conversation"]
    created_at: int
    metadata: dict[str, Any]
