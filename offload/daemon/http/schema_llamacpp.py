"""Bodies of llama.cpp's own endpoints."""

from typing import Annotated, Any, Literal

from pydantic import Field

from offload.daemon.http.schema_common import MAX_TOKENS, OpenBody, Reply, SamplingFields, TokenId


class NativeRequest(SamplingFields):
    """A text, or tokens, to be continued."""

    prompt: str | Annotated[list[TokenId | str], Field(min_length=1)]
    n_predict: Annotated[int, Field(ge=-2, le=MAX_TOKENS)] = -1
    id_slot: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] = -1
    cache_prompt: bool = True
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n_probs: Annotated[int, Field(ge=0, le=20)] = 0
    return_progress: bool = False
    return_tokens: bool = False
    json_schema: dict[str, Any] | None = None


class NativeReply(Reply):
    """What ``/completion`` answers."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: Literal[True]
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: Literal[False]
    stop_type: Literal["eos", "limit", "word", "none"]
    stopping_word: str
    timings: dict[str, float]


class SlotReply(Reply):
    """A session, seen as a slot."""

    id: int
    n_ctx: int
    is_processing: bool
    n_tokens: int
    session: str


class SlotFile(OpenBody):
    """Under which name a slot is saved, or was."""

    filename: Annotated[str, Field(min_length=1, max_length=150)] | None = None


class SlotResult(Reply):
    """What became of a slot."""

    id_slot: int
    filename: str | None = None
    n_saved: int | None = None
    n_written: int | None = None
    n_restored: int | None = None
    n_read: int | None = None
    n_erased: int | None = None
    timings: dict[str, float] | None = None


class Props(Reply):
    """What is served."""

    default_generation_settings: dict[str, Any]
    total_slots: int
    model_path: str
    chat_template: str
    build_info: str
