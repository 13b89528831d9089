"""What the HTTP side asks of the engine, and what comes back, token by token."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
MissReason = Literal["cold", "diverged", "evicted", "incompatible", "corrupt", "expired"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes
    ----------
    temperature : float
        0: the likeliest token.
    top_p, min_p : float
        Shares of probability; 1 and 0 do nothing.
    top_k : int
        0: all.
    seed : int or None
        The same seed, prompt and settings give the same tokens.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens that were generated, once and per occurrence.
    repetition_penalty : float
        Divides the logits of tokens that occurred anywhere; 1 does nothing.
    logit_bias : mapping of int to float
        Added, by token id.
    max_tokens : int or None
        None: until the context is full.
    min_tokens : int
        No stop before that many.
    stop : tuple of str
        Texts that end the answer; they are not part of it.
    stop_token_ids : tuple of int
    ignore_eos : bool
    top_logprobs : int or None
        Report each token's log-probability, and those of so many of the likeliest; None: nothing.
    prompt_logprobs : bool
        Report them for the prompt's tokens as well, which are then all computed.
    grammar : str or None
        A JSON schema, as JSON, that the answer has to fit; ``"{}"``: any JSON object.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be continued.

    Attributes
    ----------
    request_id : str
    tenant : str
        Whose keys and values may be used: never those of anybody else.
    token_ids : tuple of int
        The whole prompt. What of it is known already is found by comparing tokens.
    sampling : Sampling
    session : str or None
        A hint: which session the answer belongs to, for retention, listing and quota. None: found
        by the longest known prefix, or made.
    cache_salt : str or None
        The client's own narrowing of what may be reused, inside its tenant.
    is_kept : bool
        Whether the keys and values outlive the request.
    """

    request_id: str
    tenant: str
    token_ids: tuple[int, ...]
    sampling: Sampling
    session: str | None = None
    cache_salt: str | None = None
    is_kept: bool = True


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Tokens of a prompt that needed no prefill, by where their keys and values were.

    ``remote``: in an object store, from which they were fetched for this request.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    remote: int = 0

    @property
    def total(self) -> int:
        """Tokens, wherever they were."""
        return self.device + self.host + self.disk + self.remote


@dataclass(frozen=True, slots=True)
class Miss:
    """Why no more of a prompt was known.

    Attributes
    ----------
    at_token : int
        The first token that had to be computed.
    reason : str
    """

    at_token: int
    reason: MissReason


@dataclass(frozen=True, slots=True)
class Started:
    """A request has been given its keys and values, and is about to be computed.

    Attributes
    ----------
    session : str or None
        The session that it was found to belong to.
    num_prompt_tokens : int
    cached : CachedTokens
    restored_bytes : int
        Bytes that a session on disk was found to hold, read when attended to.
    restore_s : float
        With the time to fetch it, if it was in an object store.
    queue_s : float
        Seconds since the request was made.
    miss : Miss or None
        None: all but the last token was known.
    """

    session: str | None
    num_prompt_tokens: int
    cached: CachedTokens
    restored_bytes: int
    restore_s: float
    queue_s: float
    miss: Miss | None


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How much of a prompt is done, known or computed."""

    num_done: int
    num_prompt_tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability before penalties, of the model's own distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of every token of the prompt but the first, with the likeliest alternatives."""

    tokens: tuple[TokenLogprob, ...]
    tops: tuple[tuple[TokenLogprob, ...], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    Attributes
    ----------
    token_id : int
    text : str
        What it adds to the answer. Empty while bytes of a character are missing, or while the text
        may become one that ends the answer; what is held back comes with a later token.
    logprob : float or None
    tops : tuple of TokenLogprob
    """

    token_id: int
    text: str
    logprob: float | None = None
    tops: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event.

    Attributes
    ----------
    reason : {"stop", "length", "cancelled"}
    text : str
        What was held back and is part of the answer after all.
    stop_text : str or None
        Which of the texts ended it.
    num_prompt_tokens, num_generated_tokens : int
    cached : CachedTokens
    num_written_tokens : int
        Tokens of the prompt whose keys and values are new, and kept.
    prefill_s, decode_s, queue_s : float
    """

    reason: FinishReason
    text: str
    stop_text: str | None
    num_prompt_tokens: int
    num_generated_tokens: int
    cached: CachedTokens
    num_written_tokens: int
    prefill_s: float
    decode_s: float
    queue_s: float


Event = Started | PrefillProgress | PromptLogprobs | Token | Finished
