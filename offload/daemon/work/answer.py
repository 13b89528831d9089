"""One answer as it grows: which token comes next, what it says, and when it ends."""

from torch import Tensor

from offload.daemon.requests import FinishReason, GenerationRequest, Token, TokenLogprob
from offload.daemon.served_model import ServedModel
from offload.daemon.work.grammar import Grammar
from offload.daemon.work.sampling import Sampler
from offload.daemon.work.text_stream import TextStream


class Answer:
    """What one request generates.

    Parameters
    ----------
    model : ServedModel
    request : GenerationRequest
    max_context_tokens : int

    Raises
    ------
    BadRequest
        The grammar cannot be used.
    """

    def __init__(
        self, model: ServedModel, request: GenerationRequest, max_context_tokens: int
    ) -> None:
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_ids |= model.eos_token_ids
        self._stop_ids = stop_ids
        room = max_context_tokens - len(request.token_ids)
        self._max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        self._min_tokens = sampling.min_tokens
        grammar = None
        if sampling.grammar is not None:
            eos = min(model.eos_token_ids, default=None)
            grammar = Grammar(sampling.grammar, model.tokenizer, model.vocab_size, eos)
        self._sampler = Sampler(sampling, request.token_ids, stop_ids, grammar)
        self._text = TextStream(model.tokenizer, sampling.stop)
        self.num_tokens = 0
        self.reason: FinishReason | None = "length" if self._max_tokens <= 0 else None
        """Why the answer has ended; None while it has not."""

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is wanted; see ``Sampler.is_plain``."""
        return self._sampler.is_plain

    @property
    def stop_text(self) -> str | None:
        """The text that has ended the answer."""
        return self._text.stop_text

    def add(self, logits: Tensor) -> Token:
        """Choose and add the next token; ``logits`` are ``[vocab_size]``, float32, on the CPU."""
        return self._add(*self._sampler.choose(logits))

    def add_plain(self, token: int) -> Token:
        """Add the likeliest token."""
        return self._add(token, None, ())

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._text.finish()

    def _add(self, token: int, logprob: float | None, tops: tuple[TokenLogprob, ...]) -> Token:
        self.num_tokens += 1
        may_stop = self.num_tokens >= self._min_tokens
        is_complete = self._sampler.note(token)
        if token in self._stop_ids and may_stop:
            self.reason = "stop"
            return Token(token, "", logprob, tops)
        text = self._text.add(token, may_stop=may_stop)
        if self._text.stop_text is not None or is_complete:
            self.reason = "stop"
        elif self.num_tokens >= self._max_tokens:
            self.reason = "length"
        return Token(token, text, logprob, tops)
