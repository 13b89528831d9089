"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from typing import Any, Literal

from fastapi import APIRouter

from offload.daemon.http.context import Caller, Context, HttpContext
from offload.daemon.http.schema_common import Reply, error_responses

router = APIRouter(tags=["openai"], responses=error_responses())


class ModelReply(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelReply]


@router.get("/v1/models", response_model=ModelList)
@router.get("/models", response_model=ModelList, include_in_schema=False)
async def list_models(context: Context, _: Caller) -> dict[str, Any]:
    """List the models: there is one."""
    return {"object": "list", "data": [_model(context, context.engine.model.name)]}


@router.get("/v1/models/{model_id:path}", response_model=ModelReply)
async def get_model(model_id: str, context: Context, _: Caller) -> dict[str, Any]:
    """Describe a model."""
    return _model(context, context.model_name(model_id))


def _model(context: HttpContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(context.engine.model.created_s),
        "owned_by": "offload",
        "max_model_len": context.max_context_tokens,
    }
