"""``DaemonEngine``: what the HTTP side talks to. The work is done on a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.errors import Draining
from offload.daemon.requests import Event, Finished, GenerationRequest
from offload.daemon.served_model import ServedModel
from offload.daemon.session_service import SessionService
from offload.daemon.state import EngineState
from offload.daemon.work.mailbox import Mailbox, ask
from offload.daemon.work.worker import Ticket, Worker

if TYPE_CHECKING:
    from offload.daemon.sharing.shared_sessions import SharedSessions

R = TypeVar("R")

_LEAST_PUBLISH_S = 5.0
_PUBLISH_S = 30.0
"""Longest time to publish, at the end, what was not drained."""


class DaemonEngine:
    """A model with its sessions, asked from event loops.

    Opens the tiers, and the store of every tenant when it is first heard of. What was saved is
    listed at once, and read when it is attended to.

    ``start``, ``snapshot``, ``close`` and the properties may be used on any thread; ``generate``,
    ``drain`` and ``sessions`` on any event loop, which they never block.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings

    Raises
    ------
    ConfigError
        A setting is impossible, the folder cannot be used, or the model cannot be offloaded.
    CapacityError
        The device's capacity is too small for one session.
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        self.model = model
        self.settings = settings
        self._worker = Worker(model, settings)
        self._thread = threading.Thread(target=self._worker.run, name="offload-daemon-engine")
        self._is_draining = self._is_drained = False
        self.sessions = SessionService(self._ask, self._worker.keeper)
        self._sharing: SharedSessions | None = None
        if settings.sharing is not None:
            self._share()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and self._worker.is_open and not self._is_draining

    @property
    def is_draining(self) -> bool:
        """Whether the engine finishes what it has and takes no more."""
        return self._is_draining

    def start(self) -> None:
        """Start the thread, which takes requests at once. Once only."""
        self._worker.open()
        self._thread.start()
        if self._sharing is not None:
            self._sharing.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Compute one request.

        Yields
        ------
        Event
            ``Started``, ``PrefillProgress`` after every piece of the prompt, ``PromptLogprobs`` if
            asked for, ``Token``, and ``Finished`` at the end. Closing the iterator, or cancelling
            the task, ends the request as ``on_disconnect`` says.

        Raises
        ------
        Draining, QueueFull, SessionBusy, ContextTooLong, BadRequest
            Nothing was computed.
        OffloadError
            It could not be computed to its end.
        """
        if not self.is_ready:
            raise Draining("the engine is loading or going down")
        mailbox: Mailbox[Event | Exception] = Mailbox()
        ticket = await self._submit(request, mailbox)
        try:
            while True:
                item = await mailbox.take()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            self._worker.leave(ticket, mailbox)

    async def turn(self) -> None:
        """Return when the thread has taken a turn, or raise Draining."""
        await self._ask(lambda: None)

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, give those that run so long, then save every session.

        Sessions that are shared are published after that, in as much time again.
        """
        self._is_draining = True
        idle: Mailbox[None] = Mailbox()
        self._worker.post(lambda: self._worker.tell_when_idle(lambda: idle.put(None)))
        try:
            async with asyncio.timeout(timeout_s):
                await idle.take()
        except TimeoutError:
            await self._ask(self._worker.stop_all)
        await self._ask(self._worker.persist_all)
        if self._sharing is not None:
            await asyncio.to_thread(self._sharing.drain, max(timeout_s, _LEAST_PUBLISH_S))
            self._is_drained = True

    def close(self) -> None:
        """End every request, save what is not saved, and give everything back. Idempotent."""
        self._is_draining = True
        if self._thread.ident is None:
            self._worker.close()
        else:
            self._worker.stop()
            self._thread.join()
        if self._sharing is not None:
            self._sharing.close(0.0 if self._is_drained else _PUBLISH_S)

    def snapshot(self) -> EngineState:
        """Return the state as of the last step; cheap, on any thread."""
        state = self._worker.snapshot(is_ready=self.is_ready, is_draining=self._is_draining)
        return state if self._sharing is None else replace(state, sharing=self._sharing.state())

    def on_finished(self, callback: Callable[[Finished, GenerationRequest], object]) -> None:
        """Call this for every request that ends without an error, on the engine's thread."""
        self._worker.parts.scheduler.observers.append(callback)

    def _share(self) -> None:
        # Nobody else has to have what it imports.
        from offload.daemon.sharing.opening import open_sharing
        from offload.daemon.sharing.shared_service import SharedSessionService

        try:
            self._sharing = open_sharing(self.model, self.settings, self._worker, self._thread)
        except BaseException:
            self._worker.close()
            raise
        self.sessions = SharedSessionService(self._ask, self._worker.keeper, self._sharing)
        self._worker.admission.observers.append(self._leave_session)

    async def _submit(
        self, request: GenerationRequest, mailbox: Mailbox[Event | Exception]
    ) -> Ticket:
        """Hand a request to the engine's thread, once its session is here."""
        self._worker.admission.take(request)
        fetched = None
        if self._sharing is not None and request.session is not None:
            try:
                fetched = await self._sharing.enter((request.tenant, request.session))
            except BaseException:
                self._worker.admission.release(request)
                raise
            if self._is_draining:
                self._worker.admission.release(request)
                raise Draining("the engine is going down")
        return self._worker.add(request, mailbox, fetched)

    def _leave_session(self, request: GenerationRequest) -> None:
        if self._sharing is not None and request.session is not None:
            self._sharing.leave((request.tenant, request.session))

    async def _ask(self, job: Callable[..., R], *args: Any) -> R:
        return await ask(self._worker.post, self._worker.do, job, *args)
