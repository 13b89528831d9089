"""What the HTTP side is told by the configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from offload.tiers.sealing import Sealer

ID_HEADERS: Final = (
    "X-Claude-Code-Session-Id",
    "session-id",
    "X-Session-Affinity",
    "X-Conversation-Id",
    "X-Litellm-Session-Id",
    "X-Correlation-ID",
    "x-opencode-session",
)
"""Headers in which agents, routers and load generators say which conversation a request is of."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """Limits and habits of the HTTP side.

    Attributes
    ----------
    data_path : Path
        Private folder, made if it is missing, for stored responses and temporary archives.
    store_path : Path or None
        Folder of stored responses, if another; several daemons on one machine may share it.
    keepalive_s : float
        Silence after which a stream says that it is alive.
    send_timeout_s : float
        A client that takes nothing for so long is given up.
    max_body_bytes, max_import_bytes : int
        Of a request, and of the archive of a session.
    max_messages, max_choices : int
        Of one request.
    default_max_tokens : int or None
        Where a client says nothing. None: until the context is full.
    accept_any_model : bool
        Answer for every model name. For clients' own test suites.
    id_headers : tuple of str
        Asked for a session's name after ``X-Session-ID``; case, ``-`` and ``_`` make no difference.
    response_ttl_s : float
        Stored responses, conversations and answers are deleted when they were not used so long.
    max_stored_rows : int
        Of each kind, over all tenants; the least recently used go.
    max_store_bytes : int
        Of the file that holds them.
    num_slots : int
        Sessions that are shown as slots to clients of llama.cpp.
    is_history_verbatim : bool
        Put the very tokens that the model generated in the place of its answers in a history.
    sealer : Sealer or None
        Encrypts what is stored.
    """

    data_path: Path
    store_path: Path | None = None
    keepalive_s: float = 15.0
    send_timeout_s: float = 60.0
    max_body_bytes: int = 64 << 20
    max_import_bytes: int = 64 << 30
    max_messages: int = 10_000
    max_choices: int = 16
    default_max_tokens: int | None = None
    accept_any_model: bool = False
    id_headers: tuple[str, ...] = ID_HEADERS
    response_ttl_s: float = 30 * 86400.0
    max_stored_rows: int = 100_000
    max_store_bytes: int = 8 << 30
    num_slots: int = 4
    is_history_verbatim: bool = True
    sealer: Sealer | None = field(default=None, repr=False)
