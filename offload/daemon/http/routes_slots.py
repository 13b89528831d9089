"""``/slots``: sessions, as clients of llama.cpp know them.

Slot ``n`` is the session ``slot:n``; a saved slot is a session too, ``slot-file:`` and its name.
"""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Path as PathParam

from offload.daemon.errors import BadRequest, UnknownSession
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.context import Caller, Context, HttpContext
from offload.daemon.http.identity import clean_name
from offload.daemon.http.schema_common import MAX_TOKENS, error_responses
from offload.daemon.http.schema_llamacpp import Props, SlotFile, SlotReply, SlotResult

router = APIRouter(route_class=StrictJsonRoute, tags=["llama.cpp"], responses=error_responses())


def slot_session(slot: int) -> str:
    """Return the name of the session that a slot is."""
    return f"slot:{slot}"


@router.get("/slots", response_model=list[SlotReply])
async def list_slots(context: Context, tenant: Caller) -> list[dict[str, Any]]:
    """List the slots, used or not."""
    views = {view.name: view for view in await context.engine.sessions.list(tenant.name)}
    found = [views.get(slot_session(slot)) for slot in range(context.options.num_slots)]
    return [
        {
            "id": slot,
            "n_ctx": context.max_context_tokens,
            "is_processing": view is not None and view.state == "running",
            "n_tokens": 0 if view is None else view.num_tokens,
            "session": slot_session(slot),
        }
        for slot, view in enumerate(found)
    ]


@router.post("/slots/{slot}", response_model=SlotResult, response_model_exclude_unset=True)
async def act_on_slot(
    slot: Annotated[int, PathParam(ge=0, le=MAX_TOKENS)],
    action: Annotated[Literal["save", "restore", "erase"], Query()],
    context: Context,
    tenant: Caller,
    body: SlotFile | None = None,
) -> dict[str, Any]:
    """Save a slot under a name, bring it back, or empty it."""
    if slot >= context.options.num_slots:
        raise BadRequest(f"there is no slot {slot}; there are {context.options.num_slots}", "slot")
    if action == "erase":
        return {"id_slot": slot, "n_erased": await _erase(context, tenant.name, slot_session(slot))}
    filename = _leaf_name(body)
    began = time.monotonic()
    if action == "save":
        facts = await _save(context, tenant.name, slot, filename)
    else:
        facts = await _restore(context, tenant.name, slot, filename)
    took_ms = {f"{action}_ms": (time.monotonic() - began) * 1e3}
    return {"id_slot": slot, "filename": filename, **facts, "timings": took_ms}


def _leaf_name(body: SlotFile | None) -> str:
    """Return the name of a saved slot. It is no path: it names a session, of this tenant."""
    name = body.filename if body else None
    if name is None or clean_name(name) != name or "\\" in name or name in (".", ".."):
        raise BadRequest("filename has to be a plain name", "filename")
    return name


async def _save(context: HttpContext, tenant: str, slot: int, filename: str) -> dict[str, int]:
    sessions, target = context.engine.sessions, f"slot-file:{filename}"
    await sessions.get(tenant, slot_session(slot))
    await _erase(context, tenant, target)
    await sessions.fork(tenant, slot_session(slot), target)
    view = await sessions.persist(tenant, target)
    return {"n_saved": view.num_tokens, "n_written": view.size_bytes}


async def _restore(context: HttpContext, tenant: str, slot: int, filename: str) -> dict[str, int]:
    sessions, source = context.engine.sessions, f"slot-file:{filename}"
    await sessions.get(tenant, source)
    await _erase(context, tenant, slot_session(slot))
    view = await sessions.fork(tenant, source, slot_session(slot))
    return {"n_restored": view.num_tokens, "n_read": view.size_bytes}


async def _erase(context: HttpContext, tenant: str, name: str) -> int:
    sessions = context.engine.sessions
    try:
        view = await sessions.get(tenant, name)
    except UnknownSession:
        return 0  # an empty slot, which is what was asked for
    await sessions.delete(tenant, name)
    return view.num_tokens


@router.get("/props", response_model=Props)
async def get_props(context: Context, _: Caller) -> dict[str, Any]:
    """Describe what is served."""
    template = context.renderer.tokenizer.chat_template
    return {
        "default_generation_settings": {"n_ctx": context.max_context_tokens},
        "total_slots": context.options.num_slots,
        "model_path": context.engine.model.name,
        "chat_template": template if isinstance(template, str) else "",
        "build_info": "offload",
    }
