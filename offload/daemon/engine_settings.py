"""What the engine is told by the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.tiers.sealing import Sealer

Persist = Literal["on_idle", "write_through", "never"]
OnDisconnect = Literal["stop_and_keep", "continue", "discard"]
Overflow = Literal["error", "truncate_turns"]


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How long sessions stay where.

    Attributes
    ----------
    auto_create_min_tokens : int
        A request without a session gets one if it leaves so many tokens behind.
    idle_to_host_s, idle_to_disk_s : float or None
        Seconds without a request after which a session leaves the device, and then memory; None:
        not before room is needed.
    ttl_s : float or None
        Seconds without a request after which a session is deleted.
    persist : {"on_idle", "write_through", "never"}
        When sessions are saved: as they leave memory and every ``persist_interval_s``, after every
        request as well, or only on demand and at the end.
    persist_interval_s : float
        Longest time that what a session has gained is not on disk; also amid a long answer.
    max_per_tenant : int
    disk_quota_bytes : int or None
        Of one tenant's saved sessions.
    hard_pin_share : float
        Of a tenant's quota that pinned sessions may take.
    on_disconnect : {"stop_and_keep", "continue", "discard"}
        What becomes of a request whose client has gone: stopped and what was computed kept, carried
        on to its end, or stopped and forgotten.
    """

    auto_create_min_tokens: int = 256
    idle_to_host_s: float | None = 30.0
    idle_to_disk_s: float | None = 300.0
    ttl_s: float | None = 30 * 86400.0
    persist: Persist = "on_idle"
    persist_interval_s: float = 60.0
    max_per_tenant: int = 1000
    disk_quota_bytes: int | None = None
    hard_pin_share: float = 0.25
    on_disconnect: OnDisconnect = "stop_and_keep"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Where keys and values go, and how requests take turns.

    Attributes
    ----------
    data_path : Path
        Folder of saved sessions and of the server's secret; made, private.
    tiers : tuple of str
    capacity : mapping of str to int or str, or None
    policy : str
    codec : str, or mapping of str to str
        As for ``OffloadedCache``.
    chunk_tokens : int
    max_context_tokens : int or None
        None: what the model's config says.
    prefill_tokens : int
        Tokens of a prompt that are computed at a time; between two pieces the others decode.
    max_piece_s : float
        About how long a piece may take while others wait for their next token; it is made shorter
        for that, down to 16 tokens.
    max_running, max_waiting : int
        Requests that are computed side by side, and that wait for it.
    queue_timeout_s : float
    min_free_bytes : int
        Of the disk, that saved sessions leave to others.
    sessions : SessionSettings
    sealer : Sealer or None
        Encrypts what is written below ``data_path``.
    sharing : SharingSettings or None
        Where sessions are shared with other daemons; None: nowhere.
    """

    data_path: Path
    tiers: tuple[str, ...] = ("gpu", "cpu", "disk")
    capacity: Mapping[str, int | str] | None = None
    policy: str = "exact"
    codec: str | Mapping[str, str] = "raw"
    chunk_tokens: int = 64
    max_context_tokens: int | None = None
    prefill_tokens: int = 512
    max_piece_s: float = 0.1
    max_running: int = 64
    max_waiting: int = 256
    queue_timeout_s: float = 120.0
    min_free_bytes: int = 1 << 30
    sessions: SessionSettings = field(default_factory=SessionSettings)
    sealer: Sealer | None = field(default=None, repr=False)
    sharing: SharingSettings | None = None
