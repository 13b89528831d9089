"""Items of ``/v1/responses`` and ``/v1/conversations``, as they are stored, sent and rendered."""

from collections.abc import Sequence
from typing import Any, Final

from offload.daemon.errors import BadRequest
from offload.daemon.http.chat import Turn, schema_grammar
from offload.daemon.http.context import new_id
from offload.daemon.http.render_messages import Message, text_of
from offload.daemon.http.schema_responses import Item, ResponsesInput, TextFormat
from offload.daemon.http.tool_calls import Parts

_ROLES: Final = {"user", "assistant", "system", "developer"}
_PREFIXES: Final = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
}


def input_items(given: str | Sequence[Item] | None) -> list[Item]:
    """Return the items of a request in full: with types, ids, and lists of parts.

    Raises
    ------
    BadRequest
        An item is none that this model can read.
    """
    if given is None:
        return []
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_whole_item(item, f"input.{number}") for number, item in enumerate(items)]


def _whole_item(item: Item, param: str) -> Item:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _PREFIXES:
        raise BadRequest(f"items of type {str(kind)[:80]!r} cannot be read here", param)
    given = item.get("id")
    head = {"id": given if isinstance(given, str) and given else new_id(_PREFIXES[kind])}
    if kind == "message":
        return {**item, **head, **_message_fields(item, param)}
    if kind == "reasoning":
        return {"summary": [], **item, **head}
    for name in (
        ("call_id",) if kind == "function_call_output" else ("call_id", "name", "arguments")
    ):
        if not isinstance(item.get(name), str):
            raise BadRequest(f"a {kind} needs a text as its {name}", f"{param}.{name}")
    if kind == "function_call_output":
        text_of(item.get("output"), f"{param}.output")
    return {"status": "completed", **item, **head}


def _message_fields(item: Item, param: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise BadRequest(f"there is no role {str(role)[:80]!r}", f"{param}.role")
    text = text_of(content, f"{param}.content")
    if not isinstance(content, list):
        content = [_text_part("output_text" if role == "assistant" else "input_text", text)]
    return {"type": "message", "status": "completed", "content": content}


def _text_part(kind: str, text: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part


def output_items(
    parts: Parts, logprobs: Sequence[Any] = (), status: str = "completed"
) -> list[Item]:
    """Return an answer as items: its reasoning, its text, its calls of tools."""
    items: list[Item] = []
    if parts.reasoning:
        content = [{"type": "reasoning_text", "text": parts.reasoning}]
        items.append({"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": content})
    if parts.text.strip() or not parts.calls:
        part = _text_part("output_text", parts.text) | {"logprobs": list(logprobs)}
        head = {"type": "message", "id": new_id("msg_"), "role": "assistant", "status": status}
        items.append(head | {"content": [part]})
    for call in parts.calls:
        fields = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        head = {"type": "function_call", "id": new_id("fc_"), "status": "completed"}
        items.append(head | fields)
    return items


def messages_of_items(items: Sequence[Item]) -> list[Message]:
    """Return the conversation that items make up; calls belong to the text before them."""
    messages: list[Message] = []
    is_open = False
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            continue
        if kind == "function_call":
            if not is_open:
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = text_of(item.get("output"))
            messages.append({"role": "tool", "content": output, "tool_call_id": item["call_id"]})
        else:
            role = "system" if item["role"] == "developer" else item["role"]
            messages.append({"role": role, "content": text_of(item["content"])})
        is_open = messages[-1]["role"] == "assistant"
    return messages


def turn_of_response(body: ResponsesInput, items: Sequence[Item]) -> Turn:
    """Return what a response has to answer.

    Parameters
    ----------
    body : ResponsesInput
    items : sequence of dict
        Of its conversation, oldest first, with those of the request.
    """
    messages = messages_of_items(items) or [{"role": "user", "content": ""}]
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    choice, forced = body.tool_choice, None
    if isinstance(choice, dict):
        forced = str(choice.get("name")) if choice.get("type") == "function" else None
        choice = "auto"
    return Turn(
        messages=messages,
        tools=_functions(body.tools or ()),
        tool_choice=choice or "auto",
        forced_tool=forced,
        grammar=_grammar(body.text.format if body.text else None),
        is_truncated=body.truncation == "auto",
        template_kwargs=body.chat_template_kwargs or {},
    )


def _functions(tools: Sequence[Item]) -> list[Item]:
    """Return the tools that are functions; no others are offered to the model."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool["name"],
                "description": tool.get("description") or "",
                "parameters": tool.get("parameters") or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
        if tool.get("type") == "function" and isinstance(tool.get("name"), str)
    ]


def _grammar(wanted: TextFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    return schema_grammar(wanted.schema_ if wanted.type == "json_schema" else None)
