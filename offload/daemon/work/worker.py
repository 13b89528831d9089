"""The engine's thread: the only one that touches the model, the caches and the stores."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from offload.daemon.engine_settings import EngineSettings
from offload.daemon.errors import Draining
from offload.daemon.requests import Event, GenerationRequest
from offload.daemon.served_model import ServedModel
from offload.daemon.sharing.entry import Fetched
from offload.daemon.state import EngineState
from offload.daemon.work.admission import Admission
from offload.daemon.work.answer import Answer
from offload.daemon.work.job import Job
from offload.daemon.work.mailbox import Mailbox
from offload.daemon.work.parts import Parts, open_parts
from offload.daemon.work.publishing import Publisher
from offload.daemon.work.session_keeper import SessionKeeper
from offload.daemon.work.token_log import TokenLog

R = TypeVar("R")

_LOG = logging.getLogger(__name__)


class Ticket:
    """What a client holds of a request; ``job`` is None until the engine's thread has seen it."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.is_left = False


class Worker:
    """Runs rounds of the scheduler, and what other threads ask for in between.

    ``submit``, ``add``, ``leave``, ``post``, ``stop`` and ``snapshot`` are for any thread; the rest
    is for the engine's, which ``run`` makes its own, and before it starts.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings

    Raises
    ------
    ConfigError
        A setting is impossible.
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        self.is_open = False
        """Whether anything that is posted will be done."""
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._gate = threading.Lock()
        self._model = model
        self._settings = settings
        self._admission = Admission(model, settings)
        self._parts: Parts = open_parts(model, settings, self._admission)
        self._publisher = Publisher(model, settings, self._parts)
        self._waiting_for_idle: list[Callable[[], object]] = []
        # Before the client hears of the end, so that what it sees then has it.
        self._parts.scheduler.observers.append(lambda *_: self._publisher.publish(is_forced=True))

    @property
    def keeper(self) -> SessionKeeper:
        """What can be asked about sessions, on the engine's thread."""
        return self._parts.keeper

    @property
    def parts(self) -> Parts:
        """What the engine is made of; for its own thread."""
        return self._parts

    def close(self) -> None:
        """Give everything back, where ``run`` was never called."""
        self._parts.close()

    def run(self) -> None:
        """Work until ``stop``; then save what is not saved, and give everything back."""
        try:
            while self.is_open:
                self._wait_for_work()
                self.turn()
        except BaseException:
            _LOG.exception("the engine has stopped")
            raise
        finally:
            self.stop()
            self.shut()

    def open(self) -> None:
        """Take what is posted from now on."""
        self.is_open = True

    def post(self, job: Callable[[], object]) -> None:
        """Have the engine's thread do something. Any thread may call.

        Raises
        ------
        Draining
            It has ended, or is about to.
        """
        with self._gate:
            if not self.is_open:
                raise Draining("the engine is not running")
            self._inbox.put(job)

    @property
    def admission(self) -> Admission:
        """Who says which requests are taken; for any thread."""
        return self._admission

    def submit(self, request: GenerationRequest, mailbox: Mailbox[Event | Exception]) -> Ticket:
        """Take a request, or raise why not; its events go to the mailbox."""
        self._admission.take(request)
        return self.add(request, mailbox)

    def add(
        self,
        request: GenerationRequest,
        mailbox: Mailbox[Event | Exception],
        fetched: Fetched | None = None,
    ) -> Ticket:
        """Have a request computed that ``admission`` has taken; its events go to the mailbox.

        ``fetched`` is what was fetched for it from an object store.
        """
        ticket = Ticket()
        try:
            self.post(lambda: self._add(ticket, request, mailbox, fetched))
        except Draining:
            self._admission.release(request)
            raise
        return ticket

    def leave(self, ticket: Ticket, mailbox: Mailbox[Event | Exception]) -> None:
        """Have a request ended, as the settings say, unless it has ended."""
        mailbox.close()
        with contextlib.suppress(Draining):
            self.post(lambda: self._leave(ticket))

    def do(self, job: Callable[..., R], *args: Any) -> R:
        """Run a job of another thread's, and show what it has changed."""
        try:
            return job(*args)
        finally:
            self._publisher.publish(is_forced=True)

    def tell_when_idle(self, tell: Callable[[], object]) -> None:
        """Call something when no request runs or waits."""
        self._waiting_for_idle.append(tell)

    def stop_all(self) -> None:
        """End every request, keeping what it has."""
        self._parts.scheduler.stop_all()

    def persist_all(self) -> int:
        """Save every session; return how many could not be."""
        saved = [self._parts.persistence.try_save(session) for session in self._parts.book]
        self._parts.persistence.write_notes()
        return saved.count(False)

    def stop(self) -> None:
        """Have ``run`` end after this step. Any thread may call."""
        with self._gate:
            self.is_open = False
            self._inbox.put(lambda: None)

    def snapshot(self, *, is_ready: bool, is_draining: bool) -> EngineState:
        """Return the state as of the last step."""
        return self._publisher.state(
            self._admission.num_taken, is_ready=is_ready, is_draining=is_draining
        )

    def turn(self) -> None:
        """Do what others have asked for, one round of the scheduler, and what is due."""
        while not self._inbox.empty():
            self._inbox.get()()
        scheduler = self._parts.scheduler
        if not scheduler.is_idle and not scheduler.round():
            # Everybody who runs has a client that reads too slowly.
            threading.Event().wait(0.01)
        self._parts.housekeeping.tick()
        self._publisher.publish()
        if scheduler.is_idle:
            while self._waiting_for_idle:
                self._waiting_for_idle.pop()()

    def _wait_for_work(self) -> None:
        """Wait until somebody asks for something, or something is due, if nothing is to do."""
        if self._parts.scheduler.is_idle and self._inbox.empty():
            self._publisher.publish(is_forced=True)
            wait_s = max(0.0, self._parts.housekeeping.next_s - time.monotonic())
            with contextlib.suppress(Empty):
                self._inbox.get(timeout=wait_s)()

    def _add(
        self,
        ticket: Ticket,
        request: GenerationRequest,
        mailbox: Mailbox[Event | Exception],
        fetched: Fetched | None,
    ) -> None:
        if ticket.is_left:
            self._admission.release(request)
            return
        try:
            answer = Answer(self._model, request, self._admission.max_context_tokens)
        except Exception as error:
            self._admission.release(request)
            mailbox.put(error)
            return
        ticket.job = Job(request, mailbox, answer, TokenLog(request.token_ids), fetched=fetched)
        self._parts.scheduler.add(ticket.job)

    def _leave(self, ticket: Ticket) -> None:
        ticket.is_left = True
        how = self._settings.sessions.on_disconnect
        if ticket.job is not None and how != "continue":
            self._parts.scheduler.leave(ticket.job, is_discarded=how == "discard")

    def shut(self) -> None:
        """End every request, save every session, and give everything back."""
        while not self._inbox.empty():
            self._inbox.get()()
        scheduler = self._parts.scheduler
        for job in [*scheduler.running, *scheduler.waiting]:
            job.mailbox.put(Draining("the engine has stopped"))
            scheduler.leave(job, is_discarded=False)
        self.persist_all()
        self._publisher.publish(is_forced=True)
        self._parts.close()
