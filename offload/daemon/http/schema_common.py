"""Fields that the bodies of several APIs share, and what becomes of them.

Unknown fields are accepted everywhere: clients are newer than servers.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from offload.daemon.errors import BadRequest
from offload.daemon.requests import Sampling

MAX_TOKENS: Final = 2**31 - 1
MAX_STOPS: Final = 64
_SEED_BITS: Final = 64
_LEAST_TEMPERATURE: Final = 1e-3

Count = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]


class OpenBody(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class Reply(BaseModel):
    """The body of an answer: what is listed is there, and more may be."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class OpenAIErrorDetail(Reply):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(Reply):
    """The body of every error but those of ``/v1/messages``."""

    error: OpenAIErrorDetail


class AnthropicErrorDetail(Reply):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(Reply):
    """The body of errors of ``/v1/messages``."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None = None


_MEANINGS: Final = {
    400: "The request makes no sense, or does not fit into the context.",
    401: "No API key, or an unknown one.",
    403: "Not from this host or origin.",
    404: "There is nothing of that name.",
    409: "Another request is at it, or it belongs to another model.",
    413: "The body is too long.",
    429: "Too many requests, or too much stored.",
    500: "A fault of the server.",
    503: "Loading, draining, or the disk refuses.",
}


def error_responses(model: type[BaseModel] = OpenAIError) -> dict[int | str, dict[str, Any]]:
    """Return how the errors of an endpoint are documented."""
    return {
        status: {"model": model, "description": meaning} for status, meaning in _MEANINGS.items()
    }


def with_stream(description: str) -> dict[int | str, dict[str, Any]]:
    """Return how an answer that may be streamed is documented."""
    event = {"event": {"type": "string"}, "data": {"type": "string"}}
    schema = {"type": "object", "properties": event}
    content = {"text/event-stream": {"schema": schema}}
    return {200: {"content": content, "description": description}}


class SessionFields(OpenBody):
    """By what a session is known, in the order in which it is looked for."""

    session_id: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    vllm_xargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class SamplingFields(SessionFields):
    """How tokens are chosen; null means the default, as in OpenAI's API."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    stream: bool | None = None

    def sampling(self, max_tokens: int | None, **more: Any) -> Sampling:
        """Return the engine's form.

        Raises
        ------
        BadRequest
            A key of ``logit_bias`` is no token id, or ``top_p`` leaves nothing.
        """
        top_k = self.top_k or 0
        return Sampling(
            temperature=self._steady_temperature(),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            top_k=max(0, top_k),
            seed=None if self.seed is None else self.seed % 2 ** (_SEED_BITS - 1),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=_bias_by_id(self.logit_bias or {}),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=self.stops() + more.pop("stops", ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            **more,
        )

    def _steady_temperature(self) -> float:
        # Logits divided by less are beyond what floats can hold.
        asked = 1.0 if self.temperature is None else self.temperature
        return asked if asked >= _LEAST_TEMPERATURE else 0.0

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)


def _bias_by_id(bias: dict[str, float]) -> dict[int, float]:
    # A bias of nothing changes nothing, whatever it names.
    named = {key: value for key, value in bias.items() if value}
    for key in named:
        if not (key.isascii() and key.isdigit()) or int(key) > MAX_TOKENS:
            raise BadRequest(f"{key[:40]!r} is no token id", "logit_bias")
    return {int(key): value for key, value in named.items()}
