"""Puts the daemon together and runs it: configuration, model, engine, application, server."""

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import transformers
from starlette.middleware.cors import CORSMiddleware

from offload.daemon.http.app import build_app
from offload.daemon.ops.access import Access, configured_keys
from offload.daemon.ops.access_guard import AccessMiddleware
from offload.daemon.ops.config_convert import data_path_of, engine_settings, http_options
from offload.daemon.ops.config_live import LiveConfiguration
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.drain import Lifecycle
from offload.daemon.ops.limits import InFlight
from offload.daemon.ops.limits_request import RequestLimits
from offload.daemon.ops.logs import LOG, RequestLog, configure_logs
from offload.daemon.ops.metrics import metrics_router
from offload.daemon.ops.server import ListeningServer, address_of, listen
from offload.daemon.ops.status_routes import admin_router, page_router
from offload.daemon.ops.status_state import StatusFeed
from offload.daemon.ops.status_wear import DiskWear
from offload.daemon.ops.watched_engine import WatchedEngine
from offload.daemon.served_model import load_served_model
from offload.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.types import ASGIApp

_PRIVATE: Final = 0o077
_WEAR_FILE: Final = "wear.json"


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
    os.umask(_PRIVATE)
    configure_logs(configuration.logging)
    access = Access(configured_keys(configuration.server))
    live = LiveConfiguration(configuration, read, access)
    settings = engine_settings(configuration)
    _make_private(settings.data_path)
    if configuration.model.threads is not None:
        torch.set_num_threads(configuration.model.threads)
    transformers.utils.logging.disable_progress_bar()
    with listen(configuration.server) as listener:
        model = configuration.model
        served = load_served_model(model.path, model.dtype, model.device, model.name)
        engine = WatchedEngine(served, settings)
        engine.start()
        try:
            return asyncio.run(_serve(engine, live, access, listener, announce))
        finally:
            engine.close()
            if configuration.server.uds is not None:
                configuration.server.uds.expanduser().unlink(missing_ok=True)


async def _serve(
    engine: WatchedEngine,
    live: LiveConfiguration,
    access: Access,
    listener: socket.socket,
    announce: Callable[[str], None],
) -> int:
    closing = asyncio.Event()
    wear = DiskWear(data_path_of(live.current) / _WEAR_FILE)
    feed = StatusFeed(
        engine,
        access.tenant_names,
        wear,
        lambda: live.current.tiers.disk.write_budget_per_day,
    )
    app = _protected(_application(engine, live, access, feed, closing), live, access)
    server = ListeningServer(app, live.current)
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    def on_ready() -> None:
        address = address_of(listener)
        LOG.info("serving", address=address, model=engine.model.name, pid=os.getpid())
        announce(address)

    return await Lifecycle(engine, server, live, feed, wear, closing).run(serving, on_ready)


def _application(
    engine: WatchedEngine,
    live: LiveConfiguration,
    access: Access,
    feed: StatusFeed,
    closing: asyncio.Event,
) -> "ASGIApp":
    configuration = live.current
    options = http_options(configuration)
    log = RequestLog(
        engine.model.name,
        lambda token_ids: str(engine.model.tokenizer.decode(list(token_ids))),
        lambda: live.current.logging.prompts,
    )
    engine.observers.on_end.append(log)
    routers: list[APIRouter] = [
        admin_router(feed, engine.sessions, closing, options.send_timeout_s)
    ]
    if configuration.metrics.enabled:
        compat = configuration.metrics.compat
        routers.append(metrics_router(engine, compat, feed.written_today, lambda: live.is_good))
    if configuration.ui.enabled:
        routers.append(page_router())
    guard = InFlight(lambda: live.current.server.limits.inflight)
    return build_app(engine, options, access=access, guard=guard, extra_routers=routers)


def _protected(app: "ASGIApp", live: LiveConfiguration, access: Access) -> "ASGIApp":
    def open_paths() -> tuple[str, ...]:
        return ("/",) if live.current.metrics.auth else ("/", "/metrics")

    app = AccessMiddleware(
        RequestLimits(app, lambda: live.current.server.limits),
        access,
        open_paths,
        lambda: live.current.server.allowed_hosts,
        lambda: live.current.server.cors_origins,
    )
    origins = live.current.server.cors_origins
    if origins:
        app = CORSMiddleware(
            app, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _make_private(folder: Path) -> None:
    """Make the folder of everything that is kept, for its owner alone."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot use {folder}: {error.strerror}") from error


def write_ready_file(path: Path, address: str) -> None:
    """Tell other programs where the daemon listens: JSON with ``address`` and ``pid``."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({"address": address, "pid": os.getpid()}) + "\n")
    temporary.replace(path)
