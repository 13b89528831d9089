"""Answers that have to fit a JSON schema. Needs llguidance."""

import functools
import importlib
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from offload.daemon.errors import BadRequest

_FIELD = "response_format"

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Where blanks are free, some models never stop writing them."""


class Grammar:
    """Which tokens may come next.

    Parameters
    ----------
    schema : str
        A JSON schema, as JSON.
    tokenizer : PreTrainedTokenizerBase
    vocab_size : int
        Of the model's logits.
    eos_token_id : int or None

    Raises
    ------
    BadRequest
        The schema is none, asks for something that cannot be enforced, or llguidance is missing.
    """

    def __init__(
        self,
        schema: str,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_id: int | None,
    ) -> None:
        if find_spec("llguidance") is None:
            raise BadRequest("structured answers need llguidance: pip install llguidance", _FIELD)
        guidance: Any = importlib.import_module("llguidance")
        vocabulary = _vocabulary(tokenizer, vocab_size, eos_token_id)
        try:
            grammar = guidance.LLMatcher.grammar_from_json_schema(schema, defaults=_LAYOUT)
        except ValueError as error:
            raise BadRequest(f"the schema cannot be used: {error}", _FIELD) from error
        self._matcher: Any = guidance.LLMatcher(vocabulary, grammar)
        if self._matcher.is_error():
            raise BadRequest(f"the schema cannot be used: {self._matcher.get_error()}", _FIELD)

    def mask(self, scores: Tensor) -> Tensor:
        """Rule out what does not fit; ``scores`` are ``[vocab_size]``, float32."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = allowed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
        fits = bits.flatten()[: len(scores)].bool()
        return scores.masked_fill(~fits, -torch.inf)

    def accept(self, token: int) -> bool:
        """Take a token for chosen; return whether the answer is complete."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


@functools.lru_cache(maxsize=4)
def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_id: int | None
) -> Any:
    # Takes a second for a large vocabulary.
    bridge: Any = importlib.import_module("llguidance.hf")
    try:
        return bridge.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_token_id)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"the tokenizer knows no structured answers: {error}", _FIELD) from error
