"""``/v1/responses/{id}``: responses that are there already."""

from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from offload.daemon.http.context import Caller, Context
from offload.daemon.http.pages import page_of
from offload.daemon.http.schema_common import error_responses, with_stream
from offload.daemon.http.schema_responses import DeletedReply, ItemList, ResponseReply
from offload.daemon.http.sse import EventStream
from offload.daemon.http.sse_responses import ResponseEvents
from offload.daemon.http.store import StoredResponse

router = APIRouter(tags=["openai"], responses=error_responses())


@router.get(
    "/v1/responses/{response_id}",
    response_model=ResponseReply,
    responses=with_stream("The response; with `stream`, the events that it consists of."),
)
async def get_response(
    response_id: str,
    context: Context,
    tenant: Caller,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Return a response that was stored, or is under way."""
    found = context.background.find(tenant.name, response_id)
    if found is None:
        found = (await context.work(context.store.response, tenant.name, response_id)).body
    if not stream:
        return JSONResponse(found)
    lines = list(ResponseEvents(found | {"output": []}).replay(found))
    first = 0 if starting_after is None else starting_after + 1
    return EventStream(_replayed(lines[first:]), context.options.send_timeout_s, {})


async def _replayed(lines: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    for line in lines:
        yield line


@router.delete("/v1/responses/{response_id}", response_model=DeletedReply)
async def delete_response(response_id: str, context: Context, tenant: Caller) -> dict[str, Any]:
    """Delete a response; those that continue it can then not be continued."""
    await context.work(context.store.delete_response, tenant.name, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel", response_model=ResponseReply)
async def cancel_response(response_id: str, context: Context, tenant: Caller) -> dict[str, Any]:
    """End a response that runs in the background; one that has ended stays as it is."""
    cancelled = await context.background.cancel(tenant.name, response_id)
    if cancelled is None:
        return (await context.work(context.store.response, tenant.name, response_id)).body
    stored = StoredResponse(None, None, cancelled, [])
    await context.work(context.store.put_response, tenant.name, stored)
    return cancelled


@router.get("/v1/responses/{response_id}/input_items", response_model=ItemList)
async def list_input_items(
    response_id: str,
    context: Context,
    tenant: Caller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """List what a response was given."""
    found = await context.work(context.store.response, tenant.name, response_id)
    return page_of(found.input, after, limit, order)
