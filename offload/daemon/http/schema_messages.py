"""Bodies of ``/v1/messages``, Anthropic's API."""

from typing import Annotated, Any, Literal

from pydantic import Field

from offload.daemon.http.schema_chat import KvUsage
from offload.daemon.http.schema_common import MAX_STOPS, Count, OpenBody, Reply, SamplingFields


class Block(OpenBody):
    """A part of a message: text, thinking, a call of a tool, or what it gave."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None


class MessageField(OpenBody):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolField(OpenBody):
    """A tool; those that Anthropic's own servers run are not offered to the model."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(OpenBody):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class CountRequest(SamplingFields):
    """A conversation whose tokens are counted."""

    messages: Annotated[list[MessageField], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[ToolField] | None = None
    tool_choice: ToolChoice | None = None


class MessagesRequest(CountRequest):
    """A conversation to be continued."""

    max_tokens: Count
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer, under the name of this API too."""
        return (*super().stops(), *filter(None, self.stop_sequences or ()))


class CountReply(Reply):
    """How long a prompt would be."""

    input_tokens: int


class MessagesUsage(Reply):
    """What a request took; ``input_tokens`` are those that were neither known nor kept."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    kv: KvUsage


class MessagesReply(Reply):
    """What ``/v1/messages`` answers."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessagesUsage
