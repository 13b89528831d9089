"""``/v1/conversations``: transcripts that responses are added to."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.context import Caller, Context, new_id
from offload.daemon.http.errors import NotFound
from offload.daemon.http.pages import page_of
from offload.daemon.http.render_items import input_items
from offload.daemon.http.schema_common import error_responses
from offload.daemon.http.schema_responses import (
    ConversationReply,
    ConversationRequest,
    DeletedReply,
    ItemList,
    ItemsRequest,
    MetadataRequest,
)

router = APIRouter(route_class=StrictJsonRoute, tags=["openai"], responses=error_responses())

_PATH = "/v1/conversations/{conversation_id}"


@router.post("/v1/conversations", response_model=ConversationReply)
async def create_conversation(
    context: Context, tenant: Caller, body: ConversationRequest | None = None
) -> dict[str, Any]:
    """Make a conversation, with items if there are any."""
    given = body or ConversationRequest()
    items = input_items(given.items)
    conversation: dict[str, Any] = {
        "id": new_id("conv_"),
        "object": "conversation",
        "created_at": int(time.time()),
        "metadata": given.metadata or {},
    }
    await context.work(context.store.put_conversation, tenant.name, conversation)
    await context.work(context.store.add_items, tenant.name, conversation["id"], items)
    return conversation


@router.get(_PATH, response_model=ConversationReply)
async def get_conversation(
    conversation_id: str, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Return a conversation without its items."""
    return await context.work(context.store.conversation, tenant.name, conversation_id)


@router.post(_PATH, response_model=ConversationReply)
async def update_conversation(
    conversation_id: str, body: MetadataRequest, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Give a conversation other metadata."""
    store = context.store
    found = await context.work(store.conversation, tenant.name, conversation_id)
    conversation = found | {"metadata": body.metadata or {}}
    await context.work(store.put_conversation, tenant.name, conversation)
    return conversation


@router.delete(_PATH, response_model=DeletedReply)
async def delete_conversation(
    conversation_id: str, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Delete a conversation and its items; the session of its name stays."""
    await context.work(context.store.delete_conversation, tenant.name, conversation_id)
    return {"id": conversation_id, "object": "conversation.deleted", "deleted": True}


@router.post(_PATH + "/items", response_model=ItemList)
async def add_items(
    conversation_id: str, body: ItemsRequest, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Add items at the end of a conversation."""
    await context.work(context.store.conversation, tenant.name, conversation_id)
    items = input_items(body.items)
    await context.work(context.store.add_items, tenant.name, conversation_id, items)
    return page_of(items, None, 0, "asc")


@router.get(_PATH + "/items", response_model=ItemList)
async def list_items(
    conversation_id: str,
    context: Context,
    tenant: Caller,
    after: str | None = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """List the items of a conversation."""
    items = await context.work(context.store.items, tenant.name, conversation_id)
    return page_of(items, after, limit, order)


@router.get(_PATH + "/items/{item_id}")
async def get_item(
    conversation_id: str, item_id: str, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Return an item of a conversation."""
    items = await context.work(context.store.items, tenant.name, conversation_id)
    found = next((item for item in items if item["id"] == item_id), None)
    if found is None:
        raise NotFound(f"the conversation has no item {item_id[:80]!r}")
    return found


@router.delete(_PATH + "/items/{item_id}", response_model=ConversationReply)
async def delete_item(
    conversation_id: str, item_id: str, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Delete an item, and return the conversation."""
    store = context.store
    conversation = await context.work(store.conversation, tenant.name, conversation_id)
    await context.work(store.delete_item, tenant.name, conversation_id, item_id)
    return conversation
