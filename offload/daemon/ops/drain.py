"""The life of a running daemon: signals, reload, sd_notify, and an orderly end."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from offload.config import format_size
from offload.daemon.ops.logs import LOG
from offload.daemon.ops.notify import Notifier
from offload.errors import OffloadError

if TYPE_CHECKING:
    from offload.daemon.assembly import Daemon
    from offload.daemon.ops.server import ListeningServer

_STEP_S: Final = 5.0
"""Between two signs of life while what is dirty is written."""

_HOUSEKEEPING_S: Final = 60.0
_EXIT_FORCED: Final = 130
_EXIT_FAILED: Final = 1
_MIN_WATCHDOG_S: Final = 1.0


class Lifecycle:
    """Runs a server and its daemon until a signal, and then ends both in order.

    The first SIGTERM or SIGINT drains: ``/ready`` says 503, running requests get
    ``server.drain_timeout``, what is dirty is saved. The second ends the process at once; it loses
    what a crash loses. SIGHUP reads the configuration again. Main thread only.

    Parameters
    ----------
    daemon : Daemon
        Started.
    server : ListeningServer
    """

    def __init__(self, daemon: "Daemon", server: "ListeningServer") -> None:
        self._daemon = daemon
        self._engine = daemon.engine
        self._server = server
        self._notifier = Notifier()
        self._reloads: set[asyncio.Task[None]] = set()

    async def run(self, serving: "asyncio.Task[None]", on_ready: Callable[[], None]) -> int:
        """Wait for the end, and return the exit status.

        Parameters
        ----------
        serving : asyncio.Task
            Of the server.
        on_ready : callable
            Called when connections are taken.
        """
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload)
        listening = asyncio.create_task(self._server.is_listening.wait())
        await asyncio.wait({listening, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            listening.cancel()
            serving.result()
            return _EXIT_FAILED
        on_ready()
        self._notifier.send(READY=1, STATUS=self._status())
        keeping = asyncio.create_task(self._keep())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({keeping, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (keeping, stopping):
            task.cancel()
        is_saved = await self._end(serving)
        return 0 if is_saved and stop.is_set() else _EXIT_FAILED

    def _on_stop(self, stop: asyncio.Event) -> None:
        if stop.is_set():
            LOG.warning("stopped at once", reason="second signal")
            os._exit(_EXIT_FORCED)
        stop.set()

    def _on_reload(self) -> None:
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        self._notifier.reloading()
        is_good = self._daemon.live.reload()
        said = "configuration reloaded" if is_good else "reload refused; the log says why"
        self._notifier.send(READY=1, STATUS=said)

    async def _keep(self) -> None:
        """Tell the watchdog while the engine answers; return if its thread has died."""
        watchdog_s = self._notifier.watchdog_s
        period_s = min(_HOUSEKEEPING_S, max(_MIN_WATCHDOG_S, watchdog_s / 3 or _HOUSEKEEPING_S))
        while self._engine.is_alive:
            try:
                await self._engine.turn()
            except OffloadError as error:
                LOG.warning("the engine takes no turns", reason=str(error))
            self._notifier.send(WATCHDOG=1, STATUS=self._status())
            self._daemon.keep_wear()
            await asyncio.sleep(period_s)
        LOG.error("the engine has died")

    async def _end(self, serving: "asyncio.Task[None]") -> bool:
        """Drain, and return whether all was saved."""
        self._notifier.send(STOPPING=1, STATUS=f"draining {len(self._engine.requests)} requests")
        closing = asyncio.create_task(self._daemon.drain())
        while not closing.done():
            self._notifier.extend(2 * _STEP_S)
            await asyncio.wait({closing}, timeout=_STEP_S)
        self._server.should_exit = True
        await serving
        LOG.info("stopped", is_saved=closing.result())
        return closing.result()

    def _status(self) -> str:
        state = self._engine.snapshot()
        num_sessions = sum(state.sessions.values())
        saved = format_size(state.saved_bytes)
        return f"{num_sessions} sessions, {saved} saved, {state.num_running} requests running"
