"""Ask one model the questions of a case on one cache."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from offload.cache import OffloadedCache
from offload.evals.cases import PREVIOUS, Case, Turn
from offload.evals.contenders import Contender
from offload.evals.reads import Call, Reads, count_reads
from offload.prefill import prefill
from offload.types import PAGE_BYTES, ChunkLayout

_PREFILL_TOKENS = 512
_CHUNK_TOKENS = 64
_CONVERSATIONS = 2
"""Caches with tails of their own that are open at a time: that of the document, and one fork."""
_SPARE_CHUNKS = 16
"""Staging, or write buffers, of so short a context."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model made of one turn.

    Attributes
    ----------
    text : str
    history : tuple of int
        Tokens after the document, before the answer.
    token_ids : tuple of int
        The answer.
    first : Tensor, float32 [vocabulary]
        Log-probabilities of its first token, on the CPU.
    score : float or None
        Share of what was expected; None where nothing was.
    """

    text: str
    history: tuple[int, ...]
    token_ids: tuple[int, ...]
    first: Tensor
    score: float | None


@dataclass(frozen=True, slots=True)
class Exam:
    """All replies of one case on one cache.

    Attributes
    ----------
    replies : tuple of tuple of Reply
        Per conversation and turn.
    reads : Reads
        By the tokens that are to be sparse.
    document_tokens : int
    prefill_s, answer_s : float
    index_bytes : int
    error_median, error_p95 : float
        Of attention outputs, by the runtime's own checks; of ``num_checks`` of them.
    num_checks : int
    """

    replies: tuple[tuple[Reply, ...], ...]
    reads: Reads
    document_tokens: int
    prefill_s: float
    answer_s: float
    index_bytes: int
    error_median: float
    error_p95: float
    num_checks: int


class Examiner:
    """Asks one model.

    Parameters
    ----------
    model, tokenizer
    first_token_id : int, optional
        Put before every document, where the tokenizer does not.
    tiers : sequence of str
        Of the caches.
    disk_path : Path, optional
    shares : tuple of float, optional
        What the ``gpu`` and the ``cpu`` tier hold, as shares of a document's keys and values; the
        rest is on disk. What a step needs besides, such as growing chunks, is added. By default
        capacities are the cache's own choice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        first_token_id: int | None = None,
        tiers: Sequence[str] = ("gpu", "cpu", "disk"),
        disk_path: Path | None = None,
        shares: tuple[float, float] | None = None,
    ) -> None:
        self._model = model
        self._shares = shares
        self._tokenizer = tokenizer
        self._tiers, self._disk_path = tiers, disk_path
        config: Any = model.config
        self._num_kv_heads = int(config.get_text_config(decoder=True).num_key_value_heads)
        self._first = [] if first_token_id is None else [first_token_id]

    def count(self, document: str) -> int:
        """Return the tokens of a document."""
        return len(self._document(document))

    @torch.no_grad()
    def ask(self, case: Case, contender: Contender) -> Exam:
        """Read the document, then hold every conversation on a fork of the cache."""
        ids = self._document(case.document)
        with OffloadedCache(
            self._tiers,
            policy=contender.preset,
            codec=contender.codec,
            capacity=self._capacity(len(ids)),
            disk_path=self._disk_path,
            chunk_tokens=_CHUNK_TOKENS,
        ) as cache:
            started = time.perf_counter()
            self._read(cache, ids)
            prefilled, before = time.perf_counter(), cache.stats()
            calls, replies = [], []
            for turns in case.conversations:
                with cache.fork() as fork:
                    talk = _Talk(self._model, self._tokenizer, fork, contender)
                    replies.append(tuple(talk.reply(turn) for turn in turns))
                    calls += talk.calls
            answered, stats = time.perf_counter(), cache.stats()
            reads = count_reads(
                cache,
                contender.preset.sparse,
                calls,
                before,
                stats,
                num_kv_heads=self._num_kv_heads,
                chunk_tokens=_CHUNK_TOKENS,
            )
        return Exam(
            replies=tuple(replies),
            reads=reads,
            document_tokens=len(ids),
            prefill_s=prefilled - started,
            answer_s=answered - prefilled,
            index_bytes=stats.index_bytes,
            error_median=stats.error_median,
            error_p95=stats.error_p95,
            num_checks=stats.num_checks,
        )

    def _capacity(self, num_tokens: int) -> dict[str, int | str] | None:
        if self._shares is None:
            return None
        config = self._model.config.get_text_config(decoder=True)
        layers, dtype = int(config.num_hidden_layers), self._model.dtype
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        chunk = ChunkLayout(self._num_kv_heads, _CHUNK_TOKENS, dim, dim, dtype)
        slots = layers * -(-num_tokens // _CHUNK_TOKENS)
        beside = {"gpu": layers * _CONVERSATIONS + _SPARE_CHUNKS, "cpu": _SPARE_CHUNKS}
        sizes: dict[str, int | str] = {
            tier: int(share * slots * chunk.slot_bytes) + beside[tier] * chunk.slot_bytes
            for tier, share in zip(("gpu", "cpu"), self._shares, strict=True)
        }
        return {**sizes, "disk": 2 * slots * (PAGE_BYTES + chunk.slot_bytes) + (1 << 20)}

    def _document(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return self._first + ids

    def _read(self, cache: OffloadedCache, ids: Sequence[int]) -> None:
        # A last piece of a few tokens would be processed sparsely; a first one has nothing to skip.
        rest = len(ids) % _PREFILL_TOKENS
        for part in (ids[:rest], ids[rest:]):
            tokens = torch.tensor([part], dtype=torch.long, device=self._model.device)
            prefill(self._model, cache, tokens, _PREFILL_TOKENS, lambda _: None)


class _Talk:
    """One conversation on one cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: OffloadedCache,
        contender: Contender,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._cache, self._contender = cache, contender
        self._history: list[int] = []
        self._unread: list[int] = []
        self._previous = ""
        self.calls: list[Call] = []

    def reply(self, turn: Turn) -> Reply:
        """Say one thing and generate the answer, greedily."""
        question = turn.text.replace(PREVIOUS, self._previous)
        asked: list[int] = self._tokenizer(question, add_special_tokens=False)["input_ids"]
        self._history += asked
        history = tuple(self._history)
        logits = self._read([*self._unread, *asked], is_question=True)
        first = torch.log_softmax(logits, -1).cpu()
        answer: list[int] = []
        while True:
            answer.append(int(logits.argmax()))
            text = str(self._tokenizer.decode(answer))
            if turn.stop in text or len(answer) == turn.max_tokens or self._ends(answer[-1]):
                break
            logits = self._read(answer[-1:], is_question=False)
        self._history += answer
        self._unread = answer[-1:]
        self._previous = text.partition(turn.stop)[0]
        score = turn.score(text) if turn.expected else None
        return Reply(text, history, tuple(answer), first, score)

    def _read(self, ids: Sequence[int], *, is_question: bool) -> Tensor:
        """Run tokens through the model; return the logits after the last, float32."""
        asks_exactly = is_question and self._contender.asks_exactly
        piece = len(ids) if asks_exactly else self._contender.piece_tokens or len(ids)
        for start in range(0, len(ids), piece):
            part = torch.tensor([ids[start : start + piece]], device=self._model.device)
            num_past = int(self._cache.get_seq_length())
            output = self._model(input_ids=part, past_key_values=self._cache, use_cache=True)
            if not asks_exactly:
                self.calls.append(Call(num_past, part.shape[1]))
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _ends(self, token_id: int) -> bool:
        ends = self._model.generation_config.eos_token_id
        return token_id in (ends if isinstance(ends, list) else [ends])
