"""Puts a daemon together from its configuration: model, engine, application, and their end."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import transformers
from starlette.middleware.cors import CORSMiddleware

from offload.daemon.http.app import build_app
from offload.daemon.ops.access import Access, configured_keys
from offload.daemon.ops.access_guard import AccessMiddleware
from offload.daemon.ops.config_convert import engine_settings, http_options
from offload.daemon.ops.config_live import LiveConfiguration
from offload.daemon.ops.configuration import Configuration
from offload.daemon.ops.limits import InFlight
from offload.daemon.ops.limits_request import RequestLimits
from offload.daemon.ops.logs import LOG, RequestLog, configure_logs
from offload.daemon.ops.metrics import metrics_router
from offload.daemon.ops.status_routes import admin_router, page_router
from offload.daemon.ops.status_state import StatusFeed
from offload.daemon.ops.status_wear import DiskWear
from offload.daemon.ops.watched_engine import WatchedEngine
from offload.daemon.served_model import load_served_model
from offload.errors import ConfigError, OffloadError, StorageError

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.types import ASGIApp

_PRIVATE: Final = 0o077
_WEAR_FILE: Final = "wear.json"


def prepare_process(configuration: Configuration) -> None:
    """Set what holds for the whole process: files are private, logs, threads of torch."""
    os.umask(_PRIVATE)
    configure_logs(configuration.logging)
    if configuration.model.threads is not None:
        torch.set_num_threads(configuration.model.threads)
    transformers.utils.logging.disable_progress_bar()


class Daemon:
    """A model with its sessions and the application in front of it; knows no server.

    Whoever serves it starts it, sends requests to ``app``, whose lifespan is theirs to run, and
    drains it. ``close`` and ``start`` may be called on any thread, all else on one event loop.

    Parameters
    ----------
    configuration : Configuration
    read : callable
        Reads the configuration again, for a reload.
    store_path : Path, optional
        Folder of stored responses and conversations; the data path unless several daemons on one
        machine share them.

    Attributes
    ----------
    access : Access
    app : ASGI application
        With access control and limits.
    closing : asyncio.Event
        Set when streams that have no end have to end.
    engine : WatchedEngine
    feed : StatusFeed
    live : LiveConfiguration

    Raises
    ------
    ConfigError
        The configuration cannot be met: keys, folder, model, sizes.
    """

    def __init__(
        self,
        configuration: Configuration,
        read: Callable[[], Configuration],
        store_path: Path | None = None,
    ) -> None:
        self.access = Access(configured_keys(configuration.server))
        self.live = LiveConfiguration(configuration, read, self.access)
        settings = engine_settings(configuration)
        _make_private(settings.data_path)
        model = configuration.model
        served = load_served_model(model.path, model.dtype, model.device, model.name)
        self.engine = WatchedEngine(served, settings)
        self.closing = asyncio.Event()
        self._wear = DiskWear(settings.data_path / _WEAR_FILE)
        self.feed = StatusFeed(
            self.engine,
            self.access.tenant_names,
            self._wear,
            lambda: self.live.current.tiers.disk.write_budget_per_day,
        )
        self.app = self._protected(self._application(store_path))

    def start(self) -> None:
        """Start the engine, which takes requests at once. Once only."""
        self.engine.start()

    async def drain(self) -> bool:
        """Take no more requests, give those that run ``server.drain_timeout``, save, and close.

        Returns
        -------
        bool
            Whether all was saved.
        """
        timeout_s = self.live.current.server.drain_timeout
        LOG.info("draining", running=len(self.engine.requests), timeout_s=timeout_s)
        try:
            await self.engine.drain(timeout_s)
        except OffloadError as error:
            LOG.error("cannot save everything", reason=str(error))
            return False
        finally:
            await asyncio.to_thread(self.engine.close)
            self.closing.set()
            self.keep_wear()
        return True

    def close(self) -> None:
        """Give everything back. Idempotent, and all there is to do if it was never started."""
        self.engine.close()

    def keep_wear(self) -> None:
        """Keep the count of the bytes that were written today."""
        self.feed.written_today()
        try:
            self._wear.save()
        except StorageError as error:
            LOG.warning("cannot keep the count of bytes written", reason=str(error))

    def _application(self, store_path: Path | None) -> "ASGIApp":
        engine, live, configuration = self.engine, self.live, self.live.current
        options = http_options(configuration, store_path)
        engine.observers.on_end.append(
            RequestLog(
                engine.model.name,
                lambda token_ids: str(engine.model.tokenizer.decode(list(token_ids))),
                lambda: live.current.logging.prompts,
            )
        )
        routers: list[APIRouter] = [
            admin_router(self.feed, engine.sessions, self.closing, options.send_timeout_s)
        ]
        if configuration.metrics.enabled:
            compat, written = configuration.metrics.compat, self.feed.written_today
            routers.append(metrics_router(engine, compat, written, lambda: live.is_good))
        if configuration.ui.enabled:
            routers.append(page_router())
        guard = InFlight(lambda: live.current.server.limits.inflight)
        return build_app(engine, options, access=self.access, guard=guard, extra_routers=routers)

    def _protected(self, app: "ASGIApp") -> "ASGIApp":
        live = self.live

        def open_paths() -> tuple[str, ...]:
            return ("/",) if live.current.metrics.auth else ("/", "/metrics")

        app = AccessMiddleware(
            RequestLimits(app, lambda: live.current.server.limits),
            self.access,
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
