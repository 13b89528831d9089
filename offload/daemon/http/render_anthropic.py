"""Conversations of ``/v1/messages`` in the form that is rendered."""

import json
from collections.abc import Sequence
from typing import Any

from offload.daemon.errors import BadRequest
from offload.daemon.http.chat import Turn
from offload.daemon.http.render_messages import Message, steady_system_text
from offload.daemon.http.schema_messages import (
    Block,
    CountRequest,
    MessageField,
    ToolChoice,
    ToolField,
)

_CHOICES = {"any": "required", "none": "none"}


def turn_of_messages(body: CountRequest) -> Turn:
    """Return what a request asks for; an answer goes on with a last message of the assistant.

    Raises
    ------
    BadRequest
        A block is something else than text, thinking or tools.
    """
    messages = [
        message
        for number, field in enumerate(body.messages)
        for message in _messages(field, f"messages.{number}")
    ]
    if body.system:
        system = _system_text(body.system)
        messages.insert(0, {"role": "system", "content": system})
    choice = body.tool_choice or ToolChoice(type="auto")
    return Turn(
        messages=messages,
        tools=_tools(body.tools or ()),
        tool_choice=_CHOICES.get(choice.type, "auto"),
        forced_tool=(choice.name or "") if choice.type == "tool" else None,
        is_continued=messages[-1]["role"] == "assistant",
    )


def _system_text(system: str | list[Block]) -> str:
    if isinstance(system, str):
        return steady_system_text(system)
    return "\n".join(steady_system_text(_text(block, "system")) for block in system)


def _tools(tools: Sequence[ToolField]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
        if tool.type in (None, "custom")
    ]


def _messages(field: MessageField, param: str) -> list[Message]:
    """Return a message as one or, with results of tools in it, as several."""
    if isinstance(field.content, str):
        return [{"role": field.role, "content": field.content}]
    results = [_result(block, param) for block in field.content if block.type == "tool_result"]
    calls = [_call(block, param) for block in field.content if block.type == "tool_use"]
    thoughts = [block.thinking or "" for block in field.content if block.type == "thinking"]
    texts = [
        _text(block, param)
        for block in field.content
        if block.type not in ("tool_result", "tool_use", "thinking", "redacted_thinking")
    ]
    message: Message = {"role": field.role, "content": "".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, *([message] if texts or calls or not results else [])]


def _text(block: Block, param: str) -> str:
    if block.type != "text" or block.text is None:
        raise BadRequest(
            f"this model reads text only, and a block is of type {block.type!r}", param
        )
    return block.text


def _result(block: Block, param: str) -> Message:
    content = block.content or ""
    text = content if isinstance(content, str) else "".join(_text(part, param) for part in content)
    return {"role": "tool", "content": text, "tool_call_id": block.tool_use_id or ""}


def _call(block: Block, param: str) -> dict[str, Any]:
    if block.name is None:
        raise BadRequest("a tool_use block has no name", param)
    function = {"name": block.name, "arguments": json.dumps(block.input or {})}
    return {"id": block.id or "", "type": "function", "function": function}
