"""Bodies of ``/v1/chat/completions``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from offload.daemon.http.schema_common import Count, OpenBody, Reply, SamplingFields

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class FunctionCall(OpenBody):
    """The name and the arguments of a call."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCallField(OpenBody):
    """A call that an assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(OpenBody):
    """A part of a message; the model reads text only."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(OpenBody):
    """One message."""

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallField] | None = None
    tool_call_id: str | None = None


class FunctionTool(OpenBody):
    """What a function is called, takes and does."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(OpenBody):
    """A tool; kinds other than functions are not offered to the model."""

    type: str
    function: FunctionTool | None = None


class NamedFunction(OpenBody):
    """The function that must be called."""

    name: str


class NamedTool(OpenBody):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaFormat(OpenBody):
    """A JSON schema with its name."""

    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class ResponseFormat(OpenBody):
    """What the answer has to fit."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(OpenBody):
    """What a stream carries besides."""

    include_usage: bool | None = None


class ChatRequest(SamplingFields):
    """A conversation to be continued."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_progress: bool | None = None


class PromptDetails(Reply):
    """Of the prompt's tokens, those that were known and those that are known from now on."""

    cached_tokens: int
    cache_write_tokens: int


class BySource(Reply):
    """Known tokens by the tier they came from."""

    device: int
    host: int
    disk: int
    remote: int = 0


class MissReply(Reply):
    """Why no more of the prompt was known."""

    at_token: int
    reason: str


class KvUsage(Reply):
    """Our own part of ``usage``."""

    by_source: BySource
    restored_bytes: int
    restore_ms: float
    miss: MissReply | None


class ChatUsage(Reply):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    kv: KvUsage


class AnswerMessage(Reply):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallField] | None = None


class ChatChoice(Reply):
    """One of the answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None


class ChatReply(Reply):
    """What ``/v1/chat/completions`` answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage
