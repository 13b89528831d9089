"""Runs a daemon behind a socket of its own, until a signal."""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from offload.daemon.assembly import Daemon, prepare_process
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.drain import Lifecycle
from offload.daemon.ops.logs import LOG
from offload.daemon.ops.server import ListeningServer, address_of, listen


def run_daemon(
    configuration: Configuration,
    read: Callable[[], Configuration],
    announce: Callable[[str], None],
) -> int:
    """Serve until a signal says to stop. Main thread only.

    Parameters
    ----------
    configuration : Configuration
    read : callable
        Reads the configuration again, for a reload.
    announce : callable
        Told the address, once connections are taken.

    Returns
    -------
    int
        Exit status: 0 after an orderly end.

    Raises
    ------
    ConfigError
        The configuration cannot be met: address, keys, model, sizes.
    """
    prepare_process(configuration)
    with listen(configuration.server) as listener:
        daemon = Daemon(configuration, read)
        daemon.start()
        try:
            return asyncio.run(_serve(daemon, listener, announce))
        finally:
            daemon.close()
            if configuration.server.uds is not None:
                configuration.server.uds.expanduser().unlink(missing_ok=True)


async def _serve(daemon: Daemon, listener: socket.socket, announce: Callable[[str], None]) -> int:
    server = ListeningServer(daemon.app, daemon.live.current)
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    def on_ready() -> None:
        address = address_of(listener)
        LOG.info("serving", address=address, model=daemon.engine.model.name, pid=os.getpid())
        announce(address)

    return await Lifecycle(daemon, server).run(serving, on_ready)


def write_ready_file(path: Path, address: str) -> None:
    """Tell other programs where the daemon listens: JSON with ``address`` and ``pid``."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"address": address, "pid": os.getpid()}) + "\n")
    temporary.replace(path)
