"""``POST /tokenize``, ``/detokenize`` and ``/apply-template``."""

from typing import Any

from fastapi import APIRouter

from offload.daemon.errors import BadRequest
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.context import Caller, Context, HttpContext
from offload.daemon.http.prompts import check_ids
from offload.daemon.http.render_chat import chat_messages, function_tools
from offload.daemon.http.schema_common import error_responses
from offload.daemon.http.schema_tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TemplateReply,
    TemplateRequest,
    TokenizeReply,
    TokenizeRequest,
)

router = APIRouter(route_class=StrictJsonRoute, tags=["tokens"], responses=error_responses())


@router.post("/tokenize", response_model=TokenizeReply, response_model_exclude_unset=True)
async def tokenize(body: TokenizeRequest, context: Context, _: Caller) -> dict[str, Any]:
    """Return the tokens of a text or of a conversation."""
    ids = await context.work(_tokens_of, context, body)
    text_of = context.renderer.token_text
    tokens: list[Any] = ids
    if body.with_pieces:
        tokens = [{"id": token_id, "piece": text_of(token_id)} for token_id in ids]
    reply = {"tokens": tokens, "count": len(ids), "max_model_len": context.max_context_tokens}
    return reply | ({"token_strs": list(map(text_of, ids))} if body.return_token_strs else {})


def _tokens_of(context: HttpContext, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        prompt = context.renderer.chat(
            chat_messages(body.messages),
            function_tools(body.tools or ()),
            template_kwargs=body.chat_template_kwargs,
        )
        return list(prompt.token_ids)
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return context.renderer.encode(body.prompt, add_special_tokens=special)
    if body.content is not None:
        return context.renderer.encode(body.content, add_special_tokens=bool(body.add_special))
    raise BadRequest("one of prompt, content and messages has to be there", "prompt")


@router.post("/detokenize", response_model=DetokenizeReply)
async def detokenize(body: DetokenizeRequest, context: Context, _: Caller) -> dict[str, str]:
    """Return the text of tokens."""
    ids = check_ids(body.tokens, len(context.renderer.tokenizer))
    text = await context.work(context.renderer.decode, ids)
    return {"prompt": text, "content": text}


@router.post("/apply-template", response_model=TemplateReply)
async def apply_template(body: TemplateRequest, context: Context, _: Caller) -> dict[str, str]:
    """Return the text that a conversation becomes."""
    text = await context.work(
        context.renderer.text,
        chat_messages(body.messages),
        function_tools(body.tools or ()),
        template_kwargs=body.chat_template_kwargs,
    )
    return {"prompt": text}
