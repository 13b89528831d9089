"""Bodies of ``/tokenize``, ``/detokenize``, ``/apply-template``, of vLLM and of llama.cpp."""

from typing import Annotated, Any

from pydantic import Field

from offload.daemon.http.schema_chat import ChatMessage, Tool
from offload.daemon.http.schema_common import OpenBody, Reply, TokenId


class TokenizeRequest(OpenBody):
    """A text (``prompt`` of vLLM, ``content`` of llama.cpp), or a conversation."""

    prompt: str | None = None
    content: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    with_pieces: bool = False
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class TokenPiece(Reply):
    """A token with its text; or with its bytes, where they are no text."""

    id: int
    piece: str | list[int]


class TokenizeReply(Reply):
    """Tokens; the further fields are vLLM's."""

    tokens: list[int] | list[TokenPiece]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(OpenBody):
    """Tokens."""

    tokens: Annotated[list[TokenId], Field(max_length=10_000_000)]


class DetokenizeReply(Reply):
    """Their text, under the name of vLLM and under that of llama.cpp."""

    prompt: str
    content: str


class TemplateRequest(OpenBody):
    """A conversation."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TemplateReply(Reply):
    """The text that the model would be given."""

    prompt: str
