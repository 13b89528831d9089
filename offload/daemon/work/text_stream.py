"""Tokens into text, piece by piece: never half a character, never a part of a stop text."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "�"
_MOST_BYTES = 4
"""Of a character; tokens are bytes at least, so one that is not whole after so many never is."""


class TextStream:
    """The text of one answer as it grows.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    stops : sequence of str
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = 0  # Tokens before this one are not looked at any more;
        self._done = 0  # those before this one have been turned into text.
        self._held = ""
        self.stop_text: str | None = None
        """The text that has ended the answer."""

    def add(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; return the text that is certain now.

        Parameters
        ----------
        token : int
        may_stop : bool
            Whether a stop text that is complete now ends the answer.
        """
        self._ids.append(token)
        before = self._decode(self._start, self._done)
        text = self._decode(self._start, len(self._ids))
        if text.endswith(_UNFINISHED) and len(self._ids) - self._done < _MOST_BYTES:
            return ""
        self._start, self._done = self._done, len(self._ids)
        return self._release(text[len(before) :], may_stop=may_stop)

    def finish(self) -> str:
        """Return what was held back; there is no more."""
        before = self._decode(self._start, self._done)
        rest = self._decode(self._start, len(self._ids))[len(before) :]
        text, self._held = self._held + rest, ""
        return "" if self.stop_text is not None else text

    def _release(self, new: str, *, may_stop: bool) -> str:
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found and may_stop:
            place, self.stop_text = min(found)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, start: int, stop: int) -> str:
        text = self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may become a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
