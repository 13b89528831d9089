"""``DaemonEngine``: what the HTTP side talks to. The work is done on a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.errors import Draining
from offload.daemon.requests import Event, Finished, GenerationRequest
from offload.daemon.served_model import ServedModel
from offload.daemon.session_service import SessionService
from offload.daemon.state import EngineState
from offload.daemon.work.mailbox import Mailbox, ask
from offload.daemon.work.worker import Worker

R = TypeVar("R")


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
        self._is_draining = False
        self.sessions = SessionService(self._ask, self._worker.keeper)

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
        ticket = self._worker.submit(request, mailbox)
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

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, give those that run so long, then save every session."""
        self._is_draining = True
        idle: Mailbox[None] = Mailbox()
        self._worker.post(lambda: self._worker.tell_when_idle(lambda: idle.put(None)))
        try:
            async with asyncio.timeout(timeout_s):
                await idle.take()
        except TimeoutError:
            await self._ask(self._worker.stop_all)
        await self._ask(self._worker.persist_all)

    def close(self) -> None:
        """End every request, save what is not saved, and give everything back. Idempotent."""
        self._is_draining = True
        if self._thread.ident is None:
            self._worker.close()
            return
        self._worker.stop()
        self._thread.join()

    def snapshot(self) -> EngineState:
        """Return the state as of the last step; cheap, on any thread."""
        return self._worker.snapshot(is_ready=self.is_ready, is_draining=self._is_draining)

    def on_finished(self, callback: Callable[[Finished, GenerationRequest], object]) -> None:
        """Call this for every request that ends without an error, on the engine's thread."""
        self._worker.parts.scheduler.observers.append(callback)

    async def _ask(self, job: Callable[..., R], *args: Any) -> R:
        return await ask(self._worker.post, self._worker.do, job, *args)
