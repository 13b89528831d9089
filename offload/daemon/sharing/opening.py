"""Puts the sharing of sessions together."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.errors import Draining
from offload.daemon.served_model import ServedModel
from offload.daemon.sharing.exchange import Exchange
from offload.daemon.sharing.local_side import LocalSide
from offload.daemon.sharing.remotes import Remotes
from offload.daemon.sharing.shared_sessions import SharedSessions
from offload.daemon.sharing.sharing_state import SharingTally
from offload.daemon.work.worker import Worker
from offload.errors import ConfigError

R = TypeVar("R")

_LOOK_S = 1.0
"""How long an answer of the engine's thread is waited for before that is looked at."""


def open_sharing(
    model: ServedModel, settings: EngineSettings, worker: Worker, thread: threading.Thread
) -> SharedSessions:
    """Return the shared sessions of an engine; nothing is asked of the object store.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings
        Which have ``sharing``.
    worker : Worker
    thread : Thread
        That runs it.

    Raises
    ------
    ConfigError
        The URL is none that can be opened, obstore is missing, or the data is encrypted.
    """
    assert settings.sharing is not None
    if settings.sealer is not None:
        raise ConfigError("what is shared is not encrypted: sharing is not for encrypted data")
    parts, tally = worker.parts, SharingTally()
    local = LocalSide(model, parts.book, parts.stores, parts.persistence)

    def call(job: Callable[..., R], *args: Any) -> R:
        """Have the engine's thread run a job; what it leaves at its end is ours."""
        answer: Future[R] = Future()

        def run() -> None:
            try:
                answer.set_result(worker.do(job, *args))
            except Exception as error:
                answer.set_exception(error)

        try:
            worker.post(run)
        except Draining:
            if thread.ident is not None:
                thread.join()
            return job(*args)
        while not wait({answer}, _LOOK_S).done:
            if not thread.is_alive() and not answer.done():
                raise Draining("the engine has died")
        return answer.result()

    exchange = Exchange(Remotes(settings.sharing, local.prefix_of), local, call, tally)
    interval_s = settings.sessions.persist_interval_s
    return SharedSessions(settings.sharing, exchange, tally, interval_s)
