"""``/v1/sessions``: what a tenant has, where it is, and what is to become of it."""

import math
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from offload.daemon.errors import BadRequest
from offload.daemon.http.archive import sent_archive, temporary_file, write_body
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.chat import Turn, write_prompt
from offload.daemon.http.context import Caller, Context, HttpContext
from offload.daemon.http.prompts import plain_prompts
from offload.daemon.http.render_chat import chat_messages, function_tools
from offload.daemon.http.schema_common import error_responses
from offload.daemon.http.schema_sessions import (
    CreateRequest,
    EvictRequest,
    ExplainReply,
    ExplainRequest,
    ForkRequest,
    Name,
    PatchRequest,
    SessionList,
    SessionReply,
    explain_reply,
    session_reply,
)
from offload.daemon.ops.tenants import Tenant
from offload.errors import CorruptChunk

router = APIRouter(route_class=StrictJsonRoute, tags=["sessions"], responses=error_responses())

_PATH = "/v1/sessions/{session_id}"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.get("/v1/sessions")
async def list_sessions(context: Context, tenant: Caller) -> SessionList:
    """List the tenant's sessions."""
    views = await context.engine.sessions.list(tenant.name)
    return SessionList(object="list", data=[session_reply(view) for view in views])


@router.post("/v1/sessions")
async def create_session(body: CreateRequest, context: Context, tenant: Caller) -> SessionReply:
    """Make an empty session."""
    sessions = context.engine.sessions
    return session_reply(await sessions.create(tenant.name, body.name, body.ttl_s, body.pin))


@router.post(
    "/v1/sessions/import",
    openapi_extra={"requestBody": {"content": _BINARY, "required": True}},
)
async def import_session(
    request: Request, context: Context, tenant: Caller, name: Annotated[Name, Query()]
) -> SessionReply:
    """Add the session of an archive, which is the body, under a name."""
    async with temporary_file(context.options.data_path) as path:
        await write_body(request, path)
        try:
            view = await context.engine.sessions.import_(tenant.name, name, path)
        except CorruptChunk as error:
            # It is what the client has sent that is damaged, not what the daemon keeps.
            raise BadRequest(str(error).replace(str(path), "the archive"), "body") from error
        return session_reply(view)


@router.get(_PATH)
async def get_session(session_id: str, context: Context, tenant: Caller) -> SessionReply:
    """Describe a session."""
    return session_reply(await context.engine.sessions.get(tenant.name, session_id))


@router.patch(_PATH)
async def update_session(
    session_id: str, body: PatchRequest, context: Context, tenant: Caller
) -> SessionReply:
    """Pin a session or let go of it, or give it another time to live."""
    changes: dict[str, Any] = {"pin": body.pin}
    if "ttl_s" in body.model_fields_set:
        changes["ttl_s"] = math.inf if body.ttl_s is None else body.ttl_s
    return session_reply(await context.engine.sessions.update(tenant.name, session_id, **changes))


@router.delete(_PATH, status_code=204, response_class=Response)
async def delete_session(session_id: str, context: Context, tenant: Caller) -> None:
    """Delete a session, in memory and on disk, and the answers that were remembered of it."""
    await context.engine.sessions.delete(tenant.name, session_id)
    await context.work(context.store.forget_answers, tenant.name, session_id)


@router.post(_PATH + "/fork")
async def fork_session(
    session_id: str, body: ForkRequest, context: Context, tenant: Caller
) -> SessionReply:
    """Make a session of another's first tokens; nothing is copied."""
    sessions = context.engine.sessions
    return session_reply(await sessions.fork(tenant.name, session_id, body.name, body.at_token))


@router.post(_PATH + "/persist")
async def persist_session(session_id: str, context: Context, tenant: Caller) -> SessionReply:
    """Save what a session has gained."""
    return session_reply(await context.engine.sessions.persist(tenant.name, session_id))


@router.post(_PATH + "/evict")
async def evict_session(
    session_id: str, context: Context, tenant: Caller, body: EvictRequest | None = None
) -> SessionReply:
    """Move a session off the device, or out of memory."""
    to = (body or EvictRequest()).to
    return session_reply(await context.engine.sessions.evict(tenant.name, session_id, to))


@router.post(_PATH + "/prefetch")
async def prefetch_session(session_id: str, context: Context, tenant: Caller) -> SessionReply:
    """Bring a session up from the disk, as far as there is room."""
    return session_reply(await context.engine.sessions.prefetch(tenant.name, session_id))


@router.get(_PATH + "/explain")
async def explain_text(
    session_id: str,
    context: Context,
    tenant: Caller,
    prompt: Annotated[str, Query(max_length=4000)],
) -> ExplainReply:
    """Say where a short text leaves what a session has, and why."""
    return await _explain(context, tenant, session_id, ExplainRequest(prompt=prompt))


@router.post(_PATH + "/explain")
async def explain_prompt(
    session_id: str, body: ExplainRequest, context: Context, tenant: Caller
) -> ExplainReply:
    """Say where a text, tokens or a conversation leave what a session has, and why."""
    return await _explain(context, tenant, session_id, body)


async def _explain(
    context: HttpContext, tenant: Tenant, session_id: str, body: ExplainRequest
) -> ExplainReply:
    if body.messages:
        turn = Turn(chat_messages(body.messages), function_tools(body.tools or ()))
        token_ids = (await write_prompt(context, tenant, turn)).token_ids
    elif body.prompt:
        prompts = await plain_prompts(context, body.prompt, add_special_tokens=True)
        token_ids = prompts[0].token_ids
    else:
        raise BadRequest("a prompt or messages have to be there", "prompt")
    sessions = context.engine.sessions
    return explain_reply(await sessions.explain(tenant.name, session_id, token_ids))


@router.get(
    _PATH + "/export",
    response_class=Response,
    responses={200: {"content": _BINARY, "description": "The archive."}},
)
async def export_session(session_id: str, context: Context, tenant: Caller) -> Response:
    """Send a session as an archive."""
    async with temporary_file(context.options.data_path) as path:
        await context.engine.sessions.export(tenant.name, session_id, path)
        return await sent_archive(path, context.options.send_timeout_s)
