"""One of several daemons behind a proxy that is not ours, such as Ray Serve's. Needs no Ray.

Each replica has its own engine, tiers and folder. Requests come through the proxy; what is of one
replica only, its metrics, its status page and its administration, is asked on its own Unix socket.
"""

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload.daemon.assembly import Daemon, prepare_process
from offload.daemon.ops.config_convert import data_path_of
from offload.daemon.ops.config_sources import load_configuration
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.logs import LOG
from offload.daemon.ops.server import ListeningServer, address_of, listen
from offload.daemon.proxied import Proxied
from offload.daemon.slots import claim_slot
from offload.errors import ClosedError, ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SAVE_S: Final = 120.0
"""What saving every session may take, after the running requests have had their time."""

SOCKET: Final = "daemon.sock"
"""In the folder of each replica: where it listens itself, for its metrics and ``offload ps``."""


class ReplicaArguments(BaseModel):
    """What the builder of the application is told.

    Attributes
    ----------
    config : Path or None
        File of the configuration, on every machine that has a replica.
    set : dict of str to object
        More keys, with dots, as of ``offload serve --set``.
    replicas : int
    cpus, gpus : float
        That Ray sets aside for each replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | None = None
    set: dict[str, Any] = {}
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)

    def read(self, more: Mapping[str, Any] | None = None) -> Configuration:
        """Read the configuration; ``more`` goes before everything else.

        Raises
        ------
        ConfigError
            It is wrong, or it names a socket: the proxy listens, on a port.
        """
        configuration = load_configuration(self.config, {**self.set, **(more or {})})
        if configuration.server.uds is not None:
            raise ConfigError("server.uds: replicas are reached through a proxy, on a port")
        return configuration


class LiveKeys(BaseModel):
    """What can be changed while replicas run: Serve's ``user_config``.

    Attributes
    ----------
    reload : object
        Means nothing; another value has the configuration read again.
    set : dict of str to object
        Keys with dots, before all others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reload: Any = None
    set: dict[str, Any] = {}


class Replica:
    """A daemon with a slot of its own. All methods on one event loop.

    Parameters
    ----------
    arguments : ReplicaArguments
    count : int
        How many replicas there are.

    Raises
    ------
    ConfigError
        The configuration cannot be met.
    """

    def __init__(self, arguments: ReplicaArguments, count: int) -> None:
        configuration = arguments.read()
        prepare_process(configuration)
        self._arguments = arguments
        self._more: dict[str, Any] = {}
        self._has_started = False
        self._serving: asyncio.Task[None] | None = None
        data_path = data_path_of(configuration)
        wait_s = configuration.server.drain_timeout + SAVE_S
        with ExitStack() as held:
            self._slot = claim_slot(data_path, count, wait_s)
            held.callback(self._slot.release)
            own = self._own(configuration)
            self._listener = held.enter_context(listen(own.server))
            held.callback((self._slot.path / SOCKET).unlink, missing_ok=True)
            # What one replica was answered is continued on any other of this machine.
            self._daemon = Daemon(own, self._read, store_path=data_path)
            held.callback(self._daemon.close)
            self._held = held.pop_all()
        self._server = ListeningServer(self._daemon.app, own)

    async def start(self) -> "ASGIApp":
        """Start the engine and the replica's own server; return what the proxy is to call."""
        self._daemon.start()
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        await self._server.is_listening.wait()
        address, engine = address_of(self._listener), self._daemon.engine
        LOG.info(
            "replica serving", address=address, model=engine.model.name, slot=self._slot.number
        )
        is_trusting = self._daemon.live.current.server.allow_insecure
        return Proxied(self._daemon.app, lambda: self._daemon.access.is_open and not is_trusting)

    async def check_health(self) -> None:
        """Return when the engine has taken a turn. One that was drained is well.

        Raises
        ------
        ClosedError
            The engine's thread has died.
        """
        engine = self._daemon.engine
        if not (engine.is_alive or engine.is_draining):
            raise ClosedError(f"replica {self._slot.number}: the engine's thread has died")
        if not engine.is_draining:
            await engine.turn()
            self._daemon.keep_wear()
        self._has_started = True

    def reconfigure(self, live_keys: Mapping[str, Any]) -> None:
        """Read the configuration again, with these keys; what is wrong changes nothing.

        Raises
        ------
        ConfigError
            It is wrong, and the replica has not served yet. One that serves stays as it is, and
            says so in its log and its metrics: Serve would stop it for an error.
        """
        before = self._more
        try:
            self._more = LiveKeys.model_validate(live_keys).set
        except ValidationError as error:
            problem: str | None = self._daemon.live.refuse(f"user_config: {error}")
        else:
            problem = self.reload()
        if problem is not None:
            self._more = before
            if not self._has_started:
                raise ConfigError(problem)

    def reload(self) -> str | None:
        """Read the configuration again, and return what is wrong with it."""
        self._daemon.live.reload()
        return self._daemon.live.problem

    def record_routing_stats(self) -> dict[str, int]:
        """Return what a router may want to know of this replica."""
        state = self._daemon.engine.snapshot()
        return {
            "num_running": state.num_running,
            "num_waiting": state.num_waiting,
            "num_sessions": sum(state.sessions.values()),
            "saved_bytes": state.saved_bytes,
        }

    async def drain(self) -> bool:
        """Finish what runs, take no more, save every session; return whether all was saved."""
        return await self._daemon.drain()

    async def stop(self) -> None:
        """Drain, if that was not done, and give everything back."""
        if self._daemon.engine.is_alive:
            await self.drain()
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving
        self._held.close()
        LOG.info("replica stopped", slot=self._slot.number)

    def _read(self) -> Configuration:
        return self._own(self._arguments.read(self._more))

    def _own(self, configuration: Configuration) -> Configuration:
        """Return what is everybody's configuration with this replica's folder and socket."""
        path = self._slot.path
        server = configuration.server.model_copy(update={"uds": path / SOCKET})
        return configuration.model_copy(update={"data_path": path, "server": server})
