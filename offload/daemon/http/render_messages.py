"""Conversations of all APIs in one form, the one that chat templates read.

A message is a mapping with ``role`` (system, user, assistant, tool), ``content`` (text), and, where
there are any, ``tool_calls``, ``tool_call_id``, ``name`` and ``reasoning_content``.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from offload.daemon.errors import BadRequest

Message = dict[str, Any]

_TEXT_TYPES: Final = {"text", "input_text", "output_text", "summary_text", "reasoning_text"}

_BILLING = re.compile(r"(x-anthropic-billing-header:[^\n]*?\bcch=)[0-9a-fA-F]{5}")


def text_of(content: object, param: str = "messages") -> str:
    """Return the text of a message's content: a text, a list of parts, or nothing.

    Raises
    ------
    BadRequest
        There is something else than text in it.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise BadRequest(
            f"content is a text or a list of parts, not {type(content).__name__}", param
        )
    return "".join(_text_of_part(part, param) for part in content)


def _text_of_part(part: object, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and kind in _TEXT_TYPES and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, Mapping) and kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    raise BadRequest(f"this model reads text only, and a part is of type {str(kind)[:80]!r}", param)


def steady_system_text(text: str) -> str:
    """Take the digits that change with every request out of Claude Code's billing header.

    They stand at the very beginning of the prompt: with them, no prefix would ever be known.
    """
    return _BILLING.sub(r"\1fffff", text)


def parsed_arguments(arguments: object) -> object:
    """Return the arguments of a tool call as templates want them: an object if they are one."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments  # what a model wrote need not be JSON; templates print it as it is


def for_template(message: Mapping[str, Any]) -> Message:
    """Return a message with the arguments of its tool calls as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    parsed = [
        call
        | {
            "function": call["function"]
            | {"arguments": parsed_arguments(call["function"]["arguments"])}
        }
        for call in calls
    ]
    return {**message, "tool_calls": parsed}


def chain_digests(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a digest of the conversation up to and with each message.

    Messages count as equal whatever their reasoning, the spelling of their tool calls' JSON, the
    ids of those and white space around the text: clients send them back changed in these.
    """
    digest, found = b"", []
    for message in messages:
        calls = [
            [call["function"]["name"], parsed_arguments(call["function"]["arguments"])]
            for call in message.get("tool_calls") or ()
        ]
        facts = [message["role"], (message["content"] or "").strip(), calls]
        text = json.dumps(facts, sort_keys=True)
        digest = hashlib.blake2b(digest + text.encode(), digest_size=16).digest()
        found.append(digest.hex())
    return found
