"""Whether the daemon lives, takes requests, and how much it has to do."""

from importlib import metadata
from typing import Any, Literal

from fastapi import APIRouter

from offload.daemon.errors import Draining
from offload.daemon.http.context import Caller, Context
from offload.daemon.http.schema_common import Reply, error_responses

router = APIRouter(tags=["probes"], responses=error_responses())


class Status(Reply):
    """All is well."""

    status: Literal["ok"]


class Version(Reply):
    """Of the package."""

    version: str


class Sleeping(Reply):
    """Never: sessions sleep, the daemon does not."""

    is_sleeping: bool


class Load(Reply):
    """Requests that run and wait."""

    server_load: int
    num_running: int
    num_waiting: int


@router.get("/health", response_model=Status)
@router.get("/v1/health", response_model=Status)
@router.get("/ping", response_model=Status)
async def health(context: Context) -> dict[str, str]:
    """Answer as long as the engine's thread lives, also while it drains."""
    if not context.engine.is_alive:
        raise Draining("the engine does not run")
    return {"status": "ok"}


@router.get("/ready", response_model=Status)
async def ready(context: Context) -> dict[str, str]:
    """Answer while requests are taken."""
    if not context.engine.is_ready:
        why = "draining" if context.engine.is_draining else "Loading model"
        raise Draining(why)
    return {"status": "ok"}


@router.get("/version", response_model=Version)
async def version(_: Caller) -> dict[str, str]:
    """Return the version of the package."""
    return {"version": metadata.version("kv-offload")}


@router.get("/is_sleeping", response_model=Sleeping)
async def is_sleeping(_: Caller) -> dict[str, bool]:
    """Say that the daemon is awake; routers ask."""
    return {"is_sleeping": False}


@router.get("/load", response_model=Load)
async def load(context: Context, _: Caller) -> dict[str, Any]:
    """Return how many requests run and wait."""
    state = context.engine.snapshot()
    running, waiting = state.num_running, state.num_waiting
    return {"server_load": running + waiting, "num_running": running, "num_waiting": waiting}
