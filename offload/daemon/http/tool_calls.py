"""What a model says, taken apart while it says it: reasoning, text, and calls of tools."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"

PieceKind = Literal["text", "reasoning", "call"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model wants a tool to be called.

    Attributes
    ----------
    call_id, name : str
    arguments : str
        JSON.
    """

    call_id: str
    name: str
    arguments: str

    def openai(self) -> dict[str, Any]:
        """Return it as a message of a chat has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer.

    Attributes
    ----------
    kind : {"text", "reasoning", "call"}
    text : str
        Empty for a call.
    call : ToolCall or None
    """

    kind: PieceKind
    text: str = ""
    call: ToolCall | None = None


@dataclass(slots=True)
class Parts:
    """A whole answer, taken apart.

    Attributes
    ----------
    text, reasoning : str
    calls : list of ToolCall
    """

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take in the next piece."""
        if piece.call is not None:
            self.calls.append(piece.call)
        elif piece.kind == "reasoning":
            self.reasoning += piece.text
        else:
            self.text += piece.text

    def message(self) -> dict[str, Any]:
        """Return it as a message of a conversation."""
        calls = {"tool_calls": [call.openai() for call in self.calls]} if self.calls else {}
        return {"role": "assistant", "content": self.text, **calls}


@dataclass(frozen=True, slots=True)
class Form:
    """What to look for in an answer.

    Attributes
    ----------
    has_tools, has_reasoning : bool
        Whether calls and reasoning are told from text at all.
    is_reasoning : bool
        The answer begins amid its reasoning.
    is_forced_call : bool
        All of the answer is the JSON of one call, as a grammar made it.
    """

    has_tools: bool = False
    has_reasoning: bool = False
    is_reasoning: bool = False
    is_forced_call: bool = False


class AnswerParser:
    """Takes an answer apart, piece by piece, holding back what may become a mark.

    Parameters
    ----------
    form : Form
    """

    def __init__(self, form: Form) -> None:
        self._form = form
        self._kind: PieceKind = "reasoning" if form.is_reasoning else "text"
        self._held = ""
        if form.is_forced_call:
            self._kind = "call"

    def feed(self, text: str) -> list[Piece]:
        """Return what is certain after some more text."""
        self._held += text
        return list(self._pieces()) if text else []

    def finish(self) -> list[Piece]:
        """Return the rest."""
        rest, self._held = self._held, ""
        if self._kind == "call":
            call = parse_call(rest)
            if call is not None:
                return [Piece("call", call=call)]
            # Cut short, or no call at all: it is text, as it was written.
            rest = rest if self._form.is_forced_call else CALL + rest
        kind: PieceKind = "reasoning" if self._kind == "reasoning" else "text"
        return [Piece(kind, rest)] if rest else []

    def _pieces(self) -> Iterator[Piece]:
        while self._held:
            marks = self._marks()
            found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
            if not found:
                yield from self._certain(marks)
                return
            at, mark = min(found)
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            yield from self._close(before, mark)

    def _marks(self) -> tuple[str, ...]:
        if self._form.is_forced_call:
            return ()
        if self._kind == "call":
            return (END_CALL,)
        if self._kind == "reasoning":
            return (END_THINK,)
        tools = (CALL,) if self._form.has_tools else ()
        return (*tools, THINK) if self._form.has_reasoning else tools

    def _certain(self, marks: Sequence[str]) -> Iterator[Piece]:
        if self._kind == "call":
            return
        num_held = max((_overlap(self._held, mark) for mark in marks), default=0)
        split = len(self._held) - num_held
        text, self._held = self._held[:split], self._held[split:]
        if text:
            yield Piece(self._kind, text)

    def _close(self, before: str, mark: str) -> Iterator[Piece]:
        if mark == END_CALL:
            call = parse_call(before)
            yield (
                Piece("text", CALL + before + END_CALL)
                if call is None
                else Piece("call", call=call)
            )
        elif before:
            yield Piece(self._kind, before)
        if mark == END_THINK:
            self._held = self._held.lstrip("\n")
        following: Mapping[str, PieceKind] = {THINK: "reasoning", CALL: "call"}
        self._kind = following.get(mark, "text")


def parse_answer(text: str, form: Form) -> Parts:
    """Take a whole answer apart."""
    parser, parts = AnswerParser(form), Parts()
    for piece in [*parser.feed(text), *parser.finish()]:
        parts.add(piece)
    return parts


def parse_call(text: str) -> ToolCall | None:
    """Return the call that JSON describes, or None if it describes none.

    The arguments keep the model's own spelling where they are an object.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None  # it is the model that wrote it; whoever asks treats it as text
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in found["name"] + spelled):
        return None  # half of a surrogate pair: no answer could carry it
    return ToolCall(f"call_{secrets.token_hex(12)}", found["name"], spelled)


_ANY_ARGUMENTS: Final = {"type": "object"}


def call_grammar(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> str:
    """Return the JSON schema of a call of one of the tools, or of the one of that name."""
    functions = [tool["function"] for tool in tools]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or _ANY_ARGUMENTS,
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
        if name is None or function["name"] == name
    ]
    return json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _overlap(text: str, mark: str) -> int:
    """Return how much of the beginning of a mark a text ends with."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
