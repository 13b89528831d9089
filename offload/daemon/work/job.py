"""One request on its way through the engine."""

import time
from dataclasses import dataclass, field

from offload.daemon.requests import (
    CachedTokens,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    MissReason,
    Started,
    TokenLogprob,
)
from offload.daemon.sharing.entry import Fetched
from offload.daemon.work.answer import Answer
from offload.daemon.work.mailbox import Mailbox
from offload.daemon.work.session_book import Branch, Realm, Session
from offload.daemon.work.token_log import TokenLog


@dataclass(eq=False, slots=True)
class Job:
    """A request, what it has, and what it waits for.

    While it runs, ``branch`` holds a beginning of ``ids``: the prompt and what was generated. What
    is missing is computed; when all is there, the next token is chosen.

    Attributes
    ----------
    request : GenerationRequest
    mailbox : Mailbox
        Where its events go.
    answer : Answer
    ids : TokenLog
    submitted_s : float
        Like all times here of ``time.monotonic``.
    started_s, first_token_s : float or None
    branch : Branch or None
        None while it waits.
    session : Session or None
        That the branch becomes, if it is kept.
    num_before : int
        Tokens of the branch that were there when it was taken.
    cached : CachedTokens
    started : Started or None
        Held back until something has been computed: what is on disk is read then.
    prompt_logprobs : list of (TokenLogprob, tuple of TokenLogprob)
    is_left : bool
        The client has gone.
    num_failures : int
        Times that it lost what it had, to damage.
    setback : str or None
        Why it has to compute again what was known.
    fetched : Fetched or None
        What was fetched for it from an object store.
    """

    request: GenerationRequest
    mailbox: Mailbox[Event | Exception]
    answer: Answer
    ids: TokenLog
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None
    branch: Branch | None = None
    session: Session | None = None
    num_before: int = 0
    cached: CachedTokens = field(default_factory=CachedTokens)
    started: Started | None = None
    prompt_logprobs: list[tuple[TokenLogprob, tuple[TokenLogprob, ...]]] = field(
        default_factory=list
    )
    is_left: bool = False
    num_failures: int = 0
    setback: MissReason | None = None
    fetched: Fetched | None = None

    @property
    def realm(self) -> Realm:
        """Within which it may share."""
        return Realm(self.request.tenant, self.request.cache_salt)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are to be computed before the next one is chosen."""
        return len(self.ids) - (0 if self.branch is None else len(self.branch.tokens))

    @property
    def queue_s(self) -> float:
        """Seconds that it has waited, or waits."""
        until = time.monotonic() if self.started_s is None else self.started_s
        return until - self.submitted_s

    def finished(self, reason: FinishReason, text: str) -> Finished:
        """Return the last event."""
        now = time.monotonic()
        started = now if self.started_s is None else self.started_s
        first = now if self.first_token_s is None else self.first_token_s
        has = 0 if self.branch is None else len(self.branch.tokens)
        computed = max(0, min(has, self.num_prompt_tokens) - self.cached.total)
        return Finished(
            reason=reason,
            text=text,
            stop_text=self.answer.stop_text,
            num_prompt_tokens=self.num_prompt_tokens,
            num_generated_tokens=self.answer.num_tokens,
            cached=self.cached,
            num_written_tokens=computed if self.request.is_kept else 0,
            prefill_s=first - started,
            decode_s=now - first,
            queue_s=self.queue_s,
        )
