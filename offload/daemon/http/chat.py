"""One turn of a conversation, whichever API it came by: prepare it, and remember how it went."""

import json
import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from offload.daemon.errors import BadRequest
from offload.daemon.http.context import HttpContext
from offload.daemon.http.generation import Answer
from offload.daemon.http.render import Prompt
from offload.daemon.http.render_messages import Message, chain_digests
from offload.daemon.http.schema_common import SamplingFields
from offload.daemon.http.store import StoredAnswer
from offload.daemon.http.tool_calls import Form, Parts, call_grammar, parse_answer
from offload.daemon.ops.tenants import Tenant
from offload.daemon.requests import GenerationRequest
from offload.errors import StorageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a client asks of a conversation.

    Attributes
    ----------
    messages : sequence of mapping
    tools : sequence of mapping
        As OpenAI's chats describe them.
    tool_choice : {"none", "auto", "required"}
    forced_tool : str or None
        The name of the function that must be called.
    grammar : str or None
        A JSON schema that the answer has to fit.
    is_continued : bool
        The answer goes on with the last message.
    is_truncated : bool
        Forget the oldest turns instead of refusing a prompt that is too long.
    template_kwargs : dict
    """

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: str = "auto"
    forced_tool: str | None = None
    grammar: str | None = None
    is_continued: bool = False
    is_truncated: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def offered(self) -> Sequence[dict[str, Any]]:
        """Tools that the model is told of."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def is_call_forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.forced_tool is not None or self.tool_choice == "required"

    def answer_grammar(self) -> str | None:
        """Return the JSON schema of the answer, if it has to fit one.

        Raises
        ------
        BadRequest
            A call is asked for, and there is no such tool.
        """
        if not self.is_call_forced:
            return self.grammar
        names = [tool["function"]["name"] for tool in self.tools]
        if not names or (self.forced_tool is not None and self.forced_tool not in names):
            wanted = "any tool" if self.forced_tool is None else repr(self.forced_tool[:80])
            raise BadRequest(f"{wanted} is to be called; {len(names)} are given", "tool_choice")
        return call_grammar(self.tools, self.forced_tool)


@dataclass(frozen=True, slots=True)
class Task:
    """A turn as the engine gets it.

    Attributes
    ----------
    tenant : Tenant
    request : GenerationRequest
    prompt : Prompt
    form : Form
        How its answer is taken apart.
    """

    tenant: Tenant
    request: GenerationRequest
    prompt: Prompt
    form: Form

    def parts(self, answer: Answer) -> Parts:
        """Take an answer apart."""
        return parse_answer(answer.text, self.form)


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and for which session.

    Attributes
    ----------
    tenant : Tenant
    request_id : str
    session : str or None
    """

    tenant: Tenant
    request_id: str
    session: str | None


async def prepare(
    context: HttpContext,
    asker: Asker,
    turn: Turn,
    fields: SamplingFields,
    max_tokens: int | None,
    top_logprobs: int | None = None,
) -> Task:
    """Write the prompt of a turn.

    Raises
    ------
    BadRequest
        There is something in it that this model cannot take.
    """
    _check_count(turn, context.options.max_messages)
    grammar = turn.answer_grammar()
    prompt = await write_prompt(context, asker.tenant, turn)
    sampling = fields.sampling(
        context.options.default_max_tokens if max_tokens is None else max_tokens,
        stops=prompt.stops,
        grammar=grammar,
        top_logprobs=top_logprobs,
    )
    request = GenerationRequest(
        request_id=asker.request_id,
        tenant=asker.tenant.name,
        token_ids=prompt.token_ids,
        sampling=sampling,
        session=asker.session,
        cache_salt=fields.cache_salt,
    )
    form = Form(
        has_tools=bool(turn.offered),
        has_reasoning=context.renderer.has_reasoning and grammar is None,
        is_reasoning=prompt.is_reasoning and grammar is None,
        is_forced_call=turn.is_call_forced,
    )
    return Task(asker.tenant, request, prompt, form)


def _check_count(turn: Turn, limit: int) -> None:
    if (found := len(turn.messages)) > limit:
        raise BadRequest(f"there are {found} messages, {limit} are allowed", "messages")


async def write_prompt(context: HttpContext, tenant: Tenant, turn: Turn) -> Prompt:
    """Render a turn on the thread for that, without its oldest turns if that is allowed."""

    def render(messages: Sequence[Message]) -> Prompt:
        def recall(digest: str) -> tuple[str, bytes] | None:
            return context.store.answer(tenant.name, digest)

        return context.renderer.chat(
            messages,
            turn.offered,
            is_continued=turn.is_continued,
            template_kwargs=turn.template_kwargs,
            recall=recall if context.options.is_history_verbatim else None,
        )

    prompt = await context.work(render, turn.messages)
    if not turn.is_truncated or len(prompt.token_ids) < context.max_context_tokens:
        return prompt
    return await context.work(_shortened, context, turn.messages, render)


def _shortened(context: HttpContext, messages: Sequence[Message], render: Any) -> Prompt:
    """Drop whole turns from the oldest on, as few as will do; what the system says stays."""
    system = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    starts = [number for number, message in enumerate(others) if message["role"] == "user"] or [0]

    def is_short(start: int) -> bool:
        num_tokens = len(render([*system, *others[start:]]).token_ids)
        return num_tokens < context.max_context_tokens

    first = bisect_left(starts[:-1], True, key=is_short)
    shortened: Prompt = render([*system, *others[starts[first] :]])
    return shortened


async def remember(context: HttpContext, task: Task, answer: Answer, parts: Parts) -> None:
    """Keep the tokens of an answer, for when its conversation comes back with more."""
    if not context.options.is_history_verbatim or answer.finished is None:
        return
    # An answer that went on with what the client wrote is no message of its own.
    is_continued = task.prompt.messages[-1]["role"] == "assistant"
    if is_continued or answer.finished.reason == "cancelled":
        return

    def store() -> None:
        tokens = context.renderer.answer_tokens(answer.token_ids, answer.text)
        if tokens is None:
            return
        digest = chain_digests([*task.prompt.messages, parts.message()])[-1]
        stored = StoredAnswer(answer.session, task.prompt.opening, tokens)
        context.store.put_answer(task.tenant.name, digest, stored)

    try:
        await context.work(store)
    except StorageError as error:
        # The answer is there all the same; its next turn may cost a prefill.
        _log.warning("the tokens of an answer were not kept: %s", error)


def schema_grammar(schema: object) -> str:
    """Return a client's JSON schema as the engine takes it; None: any object."""
    return json.dumps({} if schema is None else schema)
