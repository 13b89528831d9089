"""A whole daemon in this process: the packaged model, its engine, and a server on loopback."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings
from offload.daemon.http.app import build_app
from offload.daemon.http.options import HttpOptions
from offload.daemon.ops.access import Access
from offload.daemon.ops.tenants import ApiKey, digest_of
from offload.daemon.served_model import ServedModel, load_served_model

ALICE, BOB = "sk-alice-key", "sk-bob-key"


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon that answers at ``url``."""

    engine: DaemonEngine
    app: FastAPI
    url: str

    def client(self, key: str = ALICE, **settings: Any) -> httpx.Client:
        """Return a client that shows a key."""
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


def two_tenants() -> Access:
    """Return the keys of Alice and of Bob."""
    return Access([ApiKey("alice", digest_of(ALICE)), ApiKey("bob", digest_of(BOB))])


@contextmanager
def running_engine(
    folder: Path, model: ServedModel | None = None, **settings: Any
) -> Iterator[DaemonEngine]:
    """Enter with an engine that runs the packaged model."""
    given: dict[str, Any] = {"data_path": folder / "engine", "min_free_bytes": 0} | settings
    chosen = EngineSettings(**given)
    engine = DaemonEngine(model or load_served_model(), chosen)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Enter with the address at which an application answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert server.is_listening.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@contextmanager
def running_daemon(
    folder: Path,
    access: Access | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[RunningDaemon]:
    """Enter with a daemon; settings are those of the engine, options those of ``HttpOptions``."""
    with running_engine(folder, **(settings or {})) as engine:
        given: dict[str, Any] = {"data_path": folder / "http", "default_max_tokens": 16} | options
        chosen = HttpOptions(**given)
        app = build_app(engine, chosen, access=access or two_tenants())
        with serving(app) as url:
            yield RunningDaemon(engine, app, url)
