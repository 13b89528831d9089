"""Which requests are taken, before anything is computed. Any thread may ask."""

import threading
from collections import Counter
from typing import TYPE_CHECKING

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.errors import BadRequest, ContextTooLong, QueueFull, SessionBusy
from offload.daemon.requests import GenerationRequest
from offload.daemon.served_model import ServedModel
from offload.errors import ConfigError
from offload.sessions.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_OF_SESSION = 3
"""Requests of one session: one that runs, and two that wait for it."""

_WAITS_S = (1.0, 120.0)
"""Least and most that a client is asked to wait."""


class Admission:
    """Counts the requests that were taken and are not finished.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        limit = settings.max_context_tokens or model.max_context_tokens
        self.max_context_tokens = limit
        self._vocab_size = model.vocab_size
        self._max_running = settings.max_running
        self._most = settings.max_running + settings.max_waiting
        self._lock = threading.Lock()
        self._num_taken = 0
        self._by_session: Counter[tuple[str, str]] = Counter()
        self._mean_s = 1.0
        self.observers: list[Callable[[GenerationRequest], object]] = []
        """Told of every request that was taken and has ended, however it did."""

    @property
    def num_taken(self) -> int:
        """Requests that run or wait."""
        return self._num_taken

    def take(self, request: GenerationRequest) -> None:
        """Count a request in.

        Raises
        ------
        BadRequest, ContextTooLong, QueueFull, SessionBusy
            It is not taken.
        """
        self.check(request)
        with self._lock:
            if self._num_taken >= self._most:
                raise QueueFull(
                    f"{self._num_taken} requests run or wait, the most are {self._most}",
                    self._retry_after_s(),
                )
            if request.session is not None:
                key = request.tenant, request.session
                if self._by_session[key] >= _MOST_OF_SESSION:
                    raise SessionBusy(
                        f"session {request.session!r} has {self._by_session[key]} requests that "
                        f"run or wait, the most are {_MOST_OF_SESSION}"
                    )
                self._by_session[key] += 1
            self._num_taken += 1

    def release(self, request: GenerationRequest, took_s: float | None = None) -> None:
        """Count a request out; ``took_s`` is how long it was computed, if it was."""
        with self._lock:
            self._num_taken -= 1
            if request.session is not None:
                key = request.tenant, request.session
                self._by_session[key] -= 1
                if not self._by_session[key]:
                    del self._by_session[key]
            if took_s is not None:
                self._mean_s += (took_s - self._mean_s) / 8
        for observer in self.observers:
            observer(request)

    def too_late(self, waited_s: float) -> QueueFull:
        """Return the error for a request that has waited in vain."""
        return QueueFull(
            f"the request has waited {waited_s:.0f} s for one of {self._max_running} places",
            self._retry_after_s(),
        )

    def _retry_after_s(self) -> float:
        """Return about when a place is free: the time that those ahead take, side by side."""
        ahead = self._num_taken - self._max_running + 1
        return min(max(_WAITS_S[0], ahead * self._mean_s / self._max_running), _WAITS_S[1])

    def check(self, request: GenerationRequest) -> None:
        """Raise BadRequest or ContextTooLong if a request can never be taken."""
        ids = request.token_ids
        if not ids:
            raise BadRequest("the prompt is empty", "prompt")
        if len(ids) >= self.max_context_tokens and request.sampling.max_tokens != 0:
            raise ContextTooLong(len(ids), self.max_context_tokens)
        if len(ids) > self.max_context_tokens:
            raise ContextTooLong(len(ids), self.max_context_tokens)
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise BadRequest(
                f"token ids go from 0 to {self._vocab_size - 1}; the prompt has "
                f"{min(ids)} to {max(ids)}",
                "prompt",
            )
        biased = request.sampling.logit_bias
        wrong = [token for token in biased if not 0 <= token < self._vocab_size]
        if wrong:
            raise BadRequest(f"logit_bias names token {wrong[0]}, which is none", "logit_bias")
        if request.session is not None:
            try:
                check_name(request.session)
            except ConfigError as error:
                raise BadRequest(str(error), "session_id") from error
