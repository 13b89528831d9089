"""The typed events of a streamed response, in their order, numbered."""

from collections.abc import Iterator, Sequence
from typing import Any

from offload.daemon.http.context import new_id
from offload.daemon.http.schema_responses import Item
from offload.daemon.http.sse import named_event
from offload.daemon.http.tool_calls import Parts, Piece, PieceKind


class ResponseEvents:
    """Tells how a response comes to be: each item is added, filled and done, one after the other.

    Used by one task.

    Parameters
    ----------
    response : dict
        The response as it begins.
    """

    def __init__(self, response: dict[str, Any]) -> None:
        self._head = response
        self._number = -1
        self._item: Item | None = None
        self._text = ""
        self._logprobs: list[Any] = []
        self.output: list[Item] = []
        self.parts = Parts()

    def begin(self) -> list[bytes]:
        """Return the first events."""
        return [self._status("created", self._head), self._status("in_progress", self._head)]

    def feed(self, piece: Piece, logprobs: Sequence[Any] = ()) -> list[bytes]:
        """Return the events of the next piece of the answer."""
        self.parts.add(piece)
        if piece.call is not None:
            call = piece.call
            fields = {"call_id": call.call_id, "name": call.name, "arguments": call.arguments}
            return [*self.close(), *self._call(fields)]
        opened = [] if self._is_open(piece.kind) else [*self.close(), *self._open(piece.kind)]
        self._text += piece.text
        self._logprobs += logprobs
        return [*opened, self._delta(piece.text, logprobs)]

    def close(self, status: str = "completed") -> list[bytes]:
        """Return the events that end the item under way, if there is one."""
        if self._item is None:
            return []
        item, self._item = self._item, None
        kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
        part = {"type": kind, "text": self._text} | self._extras(kind, self._logprobs)
        whole = item | {"content": [part]}
        whole |= {"status": status} if kind == "output_text" else {}
        told: dict[str, Any] = {"text": self._text}
        told |= {"logprobs": self._logprobs} if kind == "output_text" else {}
        place = self._place(item)
        self.output.append(whole)
        return [
            self._event(f"{kind}.done", place | told),
            self._event("content_part.done", place | {"part": part}),
            self._event("output_item.done", {"output_index": place["output_index"], "item": whole}),
        ]

    def end(self, response: dict[str, Any]) -> list[bytes]:
        """Return the last event, named by what became of the response."""
        return [self._status(response["status"], response)]

    def replay(self, response: dict[str, Any]) -> Iterator[bytes]:
        """Yield the events of a response that is there already, without its deltas."""
        yield from self.begin()
        for index, item in enumerate(response["output"]):
            place = {"output_index": index, "item": item}
            yield self._event("output_item.added", place)
            yield self._event("output_item.done", place)
        yield from self.end(response)

    def error(self, error: dict[str, Any]) -> bytes:
        """Return the event of an error; ``error`` is what the client's library looks for."""
        told = {name: error.get(name) for name in ("code", "message", "param")}
        return named_event("error", {**self._typed("error"), **told, "error": error})

    def _is_open(self, kind: PieceKind) -> bool:
        wanted = "reasoning" if kind == "reasoning" else "message"
        return self._item is not None and self._item["type"] == wanted

    def _open(self, kind: PieceKind) -> list[bytes]:
        self._text, self._logprobs = "", []
        if kind == "reasoning":
            item: Item = {"type": "reasoning", "id": new_id("rs_"), "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            head = {"type": "message", "id": new_id("msg_"), "role": "assistant"}
            item = {**head, "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": ""} | self._extras("output_text", [])
        self._item = item
        place = self._place(item)
        return [
            self._event("output_item.added", {"output_index": place["output_index"], "item": item}),
            self._event("content_part.added", place | {"part": part}),
        ]

    def _delta(self, text: str, logprobs: Sequence[Any]) -> bytes:
        item = self._item
        assert item is not None
        told: dict[str, Any] = {"delta": text}
        if item["type"] == "reasoning":
            return self._event("reasoning_text.delta", self._place(item) | told)
        return self._event(
            "output_text.delta", self._place(item) | told | {"logprobs": list(logprobs)}
        )

    def _call(self, fields: dict[str, str]) -> list[bytes]:
        item = {"type": "function_call", "id": new_id("fc_"), "status": "completed", **fields}
        index, arguments = len(self.output), fields["arguments"]
        self.output.append(item)
        begun = item | {"status": "in_progress", "arguments": ""}
        place = {"output_index": index, "item_id": item["id"]}
        done = {"arguments": arguments, "name": fields["name"]}
        return [
            self._event("output_item.added", {"output_index": index, "item": begun}),
            self._event("function_call_arguments.delta", place | {"delta": arguments}),
            self._event("function_call_arguments.done", place | done),
            self._event("output_item.done", {"output_index": index, "item": item}),
        ]

    def _place(self, item: Item) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self.output), "content_index": 0}

    @staticmethod
    def _extras(kind: str, logprobs: list[Any]) -> dict[str, Any]:
        return {"annotations": [], "logprobs": logprobs} if kind == "output_text" else {}

    def _status(self, name: str, response: dict[str, Any]) -> bytes:
        return self._event(name, {"response": response})

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        return named_event(f"response.{name}", {**self._typed(f"response.{name}"), **data})

    def _typed(self, name: str) -> dict[str, Any]:
        self._number += 1
        return {"type": name, "sequence_number": self._number}
