"""From a conversation to the tokens of a prompt, so that turns only ever add to it.

A chat template writes an answer of the past in its own way: without its reasoning, with the JSON of
tool calls in another spelling; and text that is tokenised again may fall into other tokens than the
model made. Each of these costs the whole prefix. So the tokens of answers are remembered, and stand
in the history in the place of what the template would make of them.
"""

import copy
import re
import secrets
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from offload.daemon.errors import BadRequest
from offload.daemon.http.render_builtin import STOPS, render_builtin
from offload.daemon.http.render_messages import Message, chain_digests, for_template

Recall = Callable[[str], tuple[str, bytes] | None]
"""Digest of a conversation that ends with an answer, to the answer's opening and tokens."""

_MAX_TRIMMED: Final = 64
_OURS: Final = re.compile(
    "conversation|messages|tools|documents|chat_template|add_generation_prompt|tokenize|padding|"
    "continue_final_message|truncation|max_length|return_.*|tokenizer_kwargs|.*_token|load_.*"
)
"""Arguments of ``apply_chat_template`` that are not for a client to set."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is given.

    Attributes
    ----------
    token_ids : tuple of int
    opening : str
        What the template wrote of the answer already.
    stops : tuple of str
        Texts that end the answer by the template's own rules.
    messages : sequence of mapping
        What it was made of.
    """

    token_ids: tuple[int, ...]
    opening: str
    stops: tuple[str, ...]
    messages: Sequence[Message]

    @property
    def is_reasoning(self) -> bool:
        """Whether the answer begins amid its reasoning."""
        return self.opening.rstrip().endswith("<think>")


class Renderer:
    """Writes prompts. One thread at a time, except for ``token_text``.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Copied: a tokenizer that encodes must not be used by others meanwhile.
    eos_token_ids : frozenset of int
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer: Any = copy.deepcopy(tokenizer)
        self._decoder: Any = copy.deepcopy(tokenizer)
        self._eos_token_ids = eos_token_ids
        self._texts: dict[int, str] = {}
        self.has_template = self.tokenizer.chat_template is not None
        self.has_reasoning = "<think>" in str(self.tokenizer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, on the event loop's thread."""
        if token_id not in self._texts:
            self._texts[token_id] = self._decoder.decode([token_id])
        return self._texts[token_id]

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_continued: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        recall: Recall | None = None,
    ) -> Prompt:
        """Write the prompt of a conversation.

        Parameters
        ----------
        messages : sequence of mapping
        tools : sequence of mapping
        is_continued : bool
            The model goes on with the last message instead of beginning one.
        template_kwargs : mapping, optional
            For the model's template, such as ``enable_thinking``.
        recall : callable, optional
            Finds the tokens of earlier answers.

        Raises
        ------
        BadRequest
            There are no messages, or the template does not take them.
        """
        kwargs = dict(template_kwargs or {})
        if not messages:
            raise BadRequest("there are no messages", "messages")
        if wrong := next(filter(_OURS.fullmatch, kwargs), None):
            raise BadRequest(f"{wrong[:80]!r} is not for clients to set", "chat_template_kwargs")
        known = self._known_answers(messages, recall) if recall else {}
        text = self._write(messages, tools, is_continued, kwargs)
        opening = "" if is_continued else self._opening(text, messages, tools, kwargs)
        ids = self._spliced(messages, tools, is_continued, kwargs, known) if known else None
        if ids is None:
            ids = self.encode(text, add_special_tokens=False)
        return Prompt(tuple(ids), opening, () if self.has_template else STOPS, messages)

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_continued: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Write the text of a conversation, as ``chat`` does where no answer is remembered."""
        return self._write(messages, tools, is_continued, dict(template_kwargs or {}))

    def answer_tokens(self, token_ids: Sequence[int], text: str) -> bytes | None:
        """Return what to remember of an answer: its tokens, if they are its text and no more.

        Parameters
        ----------
        token_ids : sequence of int
            That were generated, with those that ended the answer.
        text : str
            Of the answer, which may end before them.
        """
        ids = list(token_ids)
        while ids and ids[-1] in self._eos_token_ids:
            ids.pop()
        for _ in range(_MAX_TRIMMED):
            if not ids or self.decode(ids, skip_special_tokens=True) == text:
                break
            ids.pop()
        is_whole = bool(ids) and self.decode(ids, skip_special_tokens=True) == text
        return array("I", ids).tobytes() if is_whole else None

    def _known_answers(
        self, messages: Sequence[Message], recall: Recall
    ) -> dict[int, tuple[str, bytes]]:
        answers = {
            number: recall(digest)
            for number, digest in enumerate(chain_digests(messages))
            if messages[number]["role"] == "assistant"
        }
        return {number: answer for number, answer in answers.items() if answer is not None}

    def _write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        is_continued: bool,
        kwargs: dict[str, Any],
        *,
        is_open: bool = True,
    ) -> str:
        settings = {
            "add_generation_prompt": is_open and not is_continued,
            "continue_final_message": is_continued,
        }
        if not self.has_template:
            return render_builtin(messages, tools, **settings)
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(map(for_template, messages)),
                tools=list(tools) or None,
                tokenize=False,
                **settings,
                **kwargs,
            )
        except Exception as error:
            # Templates are programs of their own: what they raise is about what they were given.
            raise BadRequest(f"the model's chat template refuses: {error}", "messages") from error
        return text

    def _opening(
        self,
        text: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        kwargs: dict[str, Any],
    ) -> str:
        """Return what the template adds for an answer to begin."""
        closed = self._write(messages, tools, False, kwargs, is_open=False)
        return text.removeprefix(closed) if text.startswith(closed) else ""

    def _spliced(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        is_continued: bool,
        kwargs: dict[str, Any],
        known: Mapping[int, tuple[str, bytes]],
    ) -> list[int] | None:
        """Write marks in the place of known answers, and put the answers' tokens there.

        None where the template does not print every mark once, in order.
        """
        key = secrets.token_hex(8)
        marked = [
            {"role": "assistant", "content": f"[{key}:{number}]"} if number in known else message
            for number, message in enumerate(messages)
        ]
        text = self._write(marked, tools, is_continued, kwargs)
        pieces = re.split(rf"\[{key}:(\d+)\]", text)
        if [int(number) for number in pieces[1::2]] != list(known):
            return None
        ids: list[int] = []
        for piece, number in zip(pieces[::2], [*known, None], strict=True):
            opening, answer = known[number] if number is not None else ("", b"")
            ids += self.encode(piece + _missing(piece, opening), add_special_tokens=False)
            ids += array("I", answer)
        return ids


def _missing(text: str, opening: str) -> str:
    """Return the end of an opening that a text does not end with yet."""
    overlap = next(n for n in range(len(opening), -1, -1) if text.endswith(opening[:n]))
    return opening[overlap:]
