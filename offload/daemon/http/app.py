"""The application: every endpoint over one engine. Knows no server, no signals and no globals."""

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import APIRouter, FastAPI

from offload.daemon.engine import DaemonEngine
from offload.daemon.http import (
    routes_chat,
    routes_completions,
    routes_conversations,
    routes_messages,
    routes_models,
    routes_native,
    routes_probes,
    routes_responses,
    routes_sessions,
    routes_slots,
    routes_stored_responses,
    routes_tokens,
)
from offload.daemon.http.archive import clean_transfers
from offload.daemon.http.background import Background
from offload.daemon.http.body import BodyLimit
from offload.daemon.http.context import Guard, HttpContext, RequestIds, TenantFinder
from offload.daemon.http.errors import add_error_handlers
from offload.daemon.http.options import HttpOptions
from offload.daemon.http.render import Renderer
from offload.daemon.http.store import HttpStore

_IMPORT_PATH = "/v1/sessions/import"
_ROUTERS = (
    routes_chat.router,
    routes_completions.router,
    routes_messages.router,
    routes_responses.router,
    routes_stored_responses.router,
    routes_conversations.router,
    routes_models.router,
    routes_tokens.router,
    routes_sessions.router,
    routes_native.router,
    routes_slots.router,
    routes_probes.router,
)


def build_app(
    engine: DaemonEngine,
    options: HttpOptions,
    *,
    access: TenantFinder,
    guard: Guard | None = None,
    extra_routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """Return an ASGI application that serves an engine.

    Parameters
    ----------
    engine : DaemonEngine
        Started and closed by the caller.
    options : HttpOptions
    access : Access
        Tells tenants by their keys.
    guard : InFlight, optional
        Bounds what one key has under way.
    extra_routers : sequence of APIRouter
        Status page, metrics and the like; they find what they need in ``app.state.context``.

    Returns
    -------
    FastAPI
        Its lifespan closes what it has opened. Without one (some test clients run none) the store
        is closed with the process.

    Raises
    ------
    OSError
        The folder of ``options.data_path`` cannot be used.
    """
    context = _context(engine, options, access, guard)
    app = FastAPI(
        title="offload",
        summary="Long sessions behind the APIs people already use",
        version=metadata.version("kv-offload"),
        lifespan=_lifespan,
        strict_content_type=False,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.context = context
    add_error_handlers(app)
    for router in (*_ROUTERS, *extra_routers):
        app.include_router(router)

    def limit_of(path: str) -> int:
        return options.max_import_bytes if path == _IMPORT_PATH else options.max_body_bytes

    app.add_middleware(BodyLimit, limit_of=limit_of)
    app.add_middleware(RequestIds)
    return app


def _context(
    engine: DaemonEngine, options: HttpOptions, access: TenantFinder, guard: Guard | None
) -> HttpContext:
    clean_transfers(options.data_path)
    return HttpContext(
        engine=engine,
        options=options,
        access=access,
        guard=guard,
        renderer=Renderer(engine.model.tokenizer, engine.model.eos_token_ids),
        store=HttpStore(
            options.store_path or options.data_path,
            options.response_ttl_s,
            options.max_stored_rows,
            options.max_store_bytes,
            options.sealer,
        ),
        background=Background(),
        worker=ThreadPoolExecutor(1, thread_name_prefix="offload-daemon-prompts"),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    context: HttpContext = app.state.context
    await context.background.close()
    context.worker.shutdown()
    context.store.close()
