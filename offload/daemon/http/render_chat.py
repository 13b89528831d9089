"""Messages and tools of ``/v1/chat/completions`` in the form that is rendered."""

from collections.abc import Sequence
from typing import Any

from offload.daemon.errors import BadRequest
from offload.daemon.http.chat import Turn, schema_grammar
from offload.daemon.http.render_messages import Message, text_of
from offload.daemon.http.schema_chat import (
    ChatMessage,
    ChatRequest,
    NamedTool,
    ResponseFormat,
    Tool,
)

_ROLES = {"developer": "system", "function": "tool"}
_CALL: Any = {"id": True, "type": True, "function": {"name", "arguments"}}


def turn_of_chat(body: ChatRequest) -> Turn:
    """Return what a chat asks for.

    Raises
    ------
    BadRequest
        A message holds something else than text, or a schema is missing.
    """
    choice = body.tool_choice
    return Turn(
        messages=chat_messages(body.messages),
        tools=function_tools(body.tools or ()),
        tool_choice="auto" if choice is None or isinstance(choice, NamedTool) else choice,
        forced_tool=choice.function.name if isinstance(choice, NamedTool) else None,
        grammar=grammar_of_format(body.response_format),
        template_kwargs=body.chat_template_kwargs or {},
    )


def chat_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Return the messages of a chat."""
    return [_message(message, f"messages.{number}") for number, message in enumerate(messages)]


def function_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Return the tools that are functions, as templates want them."""
    return [
        {"type": "function", "function": tool.function.model_dump(exclude_none=True)}
        for tool in tools
        if tool.type == "function" and tool.function is not None
    ]


def grammar_of_format(wanted: ResponseFormat | None) -> str | None:
    """Return the JSON schema that an answer has to fit, if it has to."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return schema_grammar(None)
    if wanted.json_schema is None:
        raise BadRequest("json_schema is missing", "response_format.json_schema")
    return schema_grammar(wanted.json_schema.schema_)


def _message(message: ChatMessage, param: str) -> Message:
    parts = message.content
    content = parts if isinstance(parts, str) else [part.model_dump() for part in parts or ()]
    found: Message = {
        "role": _ROLES.get(message.role, message.role),
        "content": text_of(content, param),
    }
    if message.tool_calls:
        found["tool_calls"] = [call.model_dump(include=_CALL) for call in message.tool_calls]
    reasoning = (message.model_extra or {}).get("reasoning_content")
    if isinstance(reasoning, str):
        found["reasoning_content"] = reasoning
    named = {"tool_call_id": message.tool_call_id, "name": message.name}
    return found | {key: value for key, value in named.items() if value is not None}
