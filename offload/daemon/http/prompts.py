"""Prompts that are no conversations: texts and tokens, several at once, each continued n times."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from offload.daemon.engine import DaemonEngine
from offload.daemon.errors import BadRequest
from offload.daemon.http.context import HttpContext
from offload.daemon.http.generation import Answer, answers_of, further, side_by_side
from offload.daemon.requests import GenerationRequest, Sampling

_AT_A_TIME: Final = 16
"""Prompts of one request that are computed side by side; other clients wait in the same queue."""


@dataclass(frozen=True, slots=True)
class PlainPrompt:
    """A text with its tokens."""

    text: str
    token_ids: tuple[int, ...]


async def plain_prompts(
    context: HttpContext, prompt: str | Sequence[object], *, add_special_tokens: bool
) -> list[PlainPrompt]:
    """Return the prompts of a request.

    Raises
    ------
    BadRequest
        There is no such token, or a text has none at all.
    """
    is_single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts: Sequence[object] = [prompt] if is_single else prompt
    num_ids = len(context.renderer.tokenizer)

    def encode() -> list[PlainPrompt]:
        return [_encoded(context, item, num_ids, add_special_tokens) for item in prompts]

    return await context.work(encode)


def _encoded(
    context: HttpContext, prompt: object, num_ids: int, add_special_tokens: bool
) -> PlainPrompt:
    renderer = context.renderer
    if isinstance(prompt, str):
        ids = renderer.encode(prompt, add_special_tokens=add_special_tokens)
        text = prompt
    else:
        ids = check_ids(prompt, num_ids)
        text = renderer.decode(ids)
    if not ids:
        raise BadRequest("the prompt has no tokens", "prompt")
    return PlainPrompt(text, tuple(ids))


def check_ids(ids: object, num_ids: int) -> list[int]:
    """Return token ids that the model has, or raise BadRequest."""
    found = list(ids) if isinstance(ids, Sequence) else []
    wrong = next((token_id for token_id in found if not 0 <= token_id < num_ids), None)
    if wrong is not None:
        raise BadRequest(f"there is no token {wrong}; the vocabulary has {num_ids}", "prompt")
    return found


def requests_of(
    prompts: Sequence[PlainPrompt], base: GenerationRequest, sampling: Sampling
) -> list[GenerationRequest]:
    """Return one request for each prompt; only a single one belongs to the session."""
    session = base.session if len(prompts) == 1 else None
    return [
        GenerationRequest(
            request_id=base.request_id if number == 0 else f"{base.request_id}-p{number}",
            tenant=base.tenant,
            token_ids=prompt.token_ids,
            sampling=sampling,
            session=session,
            cache_salt=base.cache_salt,
        )
        for number, prompt in enumerate(prompts)
    ]


async def all_answers(
    engine: DaemonEngine, requests: Sequence[GenerationRequest], num_choices: int
) -> list[list[Answer]]:
    """Run all requests, a bounded number at a time."""
    turnstile = asyncio.Semaphore(_AT_A_TIME)

    async def run(request: GenerationRequest) -> list[Answer]:
        async with turnstile:
            return await answers_of(engine, request, num_choices)

    return await side_by_side([run(request) for request in requests])


def every_choice(
    requests: Sequence[GenerationRequest], num_choices: int
) -> list[GenerationRequest]:
    """Return the requests of all choices of all prompts, in the order of their indexes."""
    return [
        request if number == 0 else further(request, number)
        for request in requests
        for number in range(num_choices)
    ]
