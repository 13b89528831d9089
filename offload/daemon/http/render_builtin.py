"""How a conversation is written for a model that has no chat template of its own.

::

    System:
    You are helpful.

    User:
    What is the code?

    Assistant:
    4711

    User:
    Thank you.

    Assistant:

The names are those of base models' commonest texts; nothing has to be in the vocabulary. An answer
ends where the next name would begin. Tools are described in the system text, and called as
``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, the form that most models know.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

STOPS: Final = ("\n\nUser:", "\n\nSystem:", "\n\nTool:")
"""Texts that end an answer."""

OPENING: Final = "Assistant:\n"

_NAMES: Final = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}

_TOOLS: Final = """You may call these functions:
{functions}
To call one, answer with <tool_call>{{"name": "…", "arguments": {{…}}}}</tool_call>."""


def render_builtin(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """Write a conversation as text.

    Parameters
    ----------
    messages : sequence of mapping
        With ``role``, ``content``, and ``tool_calls`` where there are any.
    tools : sequence of mapping
        As OpenAI's API describes them.
    add_generation_prompt : bool
        End with the beginning of an answer.
    continue_final_message : bool
        Leave the last message open, for the model to go on.

    Returns
    -------
    str
        Longer conversations only add to the text of shorter ones.
    """
    turns = [f"{_NAMES[message['role']]}:\n{_content(message)}\n\n" for message in messages]
    if tools:
        functions = "\n".join(json.dumps(tool["function"], sort_keys=True) for tool in tools)
        turns.insert(0, f"System:\n{_TOOLS.format(functions=functions)}\n\n")
    if continue_final_message:
        return "".join(turns).removesuffix("\n\n")
    return "".join(turns) + (OPENING if add_generation_prompt else "")


def _content(message: Mapping[str, Any]) -> str:
    calls = [f"<tool_call>{_call(call)}</tool_call>" for call in message.get("tool_calls", ())]
    content = message["content"] or ""
    return "\n".join([content, *calls]) if content else "\n".join(calls)


def _call(call: Mapping[str, Any]) -> str:
    return json.dumps(
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
    )
