"""What is seen of the engine from outside: plain values, made on its thread, safe on any other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from offload.daemon.requests import CachedTokens, MissReason
from offload.daemon.sharing.sharing_state import SharingState

SessionState = Literal["running", "device", "host", "disk", "remote"]

TIER_NAMES = {"gpu": "device", "cpu": "host", "disk": "disk"}
"""How the tiers of ``OffloadedCache`` are called here."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session of one tenant.

    Attributes
    ----------
    name : str
    num_tokens : int
    tokens : CachedTokens
        By the tier that their keys and values are read from.
    size_bytes : int
        Of its keys and values, shared or not.
    dirty_tokens : int
        Those that would be lost now if the process were killed.
    state : {"running", "device", "host", "disk", "remote"}
        A request is adding to it; or the fastest tier that holds any of it. Remote: others have
        published it, or something newer than is here, and it is fetched when it is used.
    is_pinned : bool
    ttl_s : float or None
        Seconds without a request after which it is deleted; None: never.
    expires_s : float or None
        When that would be; like all times here in seconds since 1970.
    created_s, last_used_s : float
    parent : str or None
        The session it was forked from.
    last_hit_share : float
        Of the last prompt's tokens, those that were known.
    num_requests : int
    """

    name: str
    num_tokens: int
    tokens: CachedTokens
    size_bytes: int
    dirty_tokens: int
    state: SessionState
    is_pinned: bool
    ttl_s: float | None
    expires_s: float | None
    created_s: float
    last_used_s: float
    parent: str | None
    last_hit_share: float
    num_requests: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a prompt leaves what a session has, and why.

    Attributes
    ----------
    num_common_tokens : int
        The first token that differs, or as many as both have.
    num_session_tokens, num_prompt_tokens : int
    session_text, prompt_text : str
        What stands around that token, 40 characters on either side.
    split_at : int
        Characters of both texts that are equal and come before it.
    reason : str
        A sentence.
    miss : str or None
        Why not all of the prompt but its last token would be found; None if it would.
    """

    num_common_tokens: int
    num_session_tokens: int
    num_prompt_tokens: int
    session_text: str
    prompt_text: str
    split_at: int
    reason: str
    miss: MissReason | None


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier of all sessions together.

    Attributes
    ----------
    name : {"device", "host", "disk"}
    capacity_bytes, used_bytes, peak_bytes : int
    read_bytes, written_bytes : int
        Toward the device and into the tier, since the start.
    read_bytes_per_s, written_bytes_per_s : float
        Over the last seconds.
    """

    name: str
    capacity_bytes: int
    used_bytes: int
    peak_bytes: int
    read_bytes: int
    written_bytes: int
    read_bytes_per_s: float = 0.0
    written_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """What happened since the start.

    Attributes
    ----------
    requests, cancelled, failed : int
        That were taken; that the client left; that ended with an error.
    prompt_tokens, computed_tokens, generated_tokens : int
    cached : CachedTokens
    prefill_s, decode_s : float
        Of the engine's time.
    prefill_s_saved : float
        What the cached tokens would have taken, at the rate measured.
    restores, restored_bytes : int
        Sessions taken up again from disk.
    persists, persisted_bytes, failed_persists : int
        Saves of sessions.
    evictions : mapping of str to int
        By the tier that a session was moved to: ``"host"``, ``"disk"``; or ``"none"``: expired, or
        out of quota.
    misses : mapping of str to int
        By reason.
    preemptions : int
    """

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached: CachedTokens = field(default_factory=CachedTokens)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_s_saved: float = 0.0
    restores: int = 0
    restored_bytes: int = 0
    persists: int = 0
    persisted_bytes: int = 0
    failed_persists: int = 0
    evictions: Mapping[str, int] = field(default_factory=dict)
    misses: Mapping[str, int] = field(default_factory=dict)
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine at one moment.

    Attributes
    ----------
    model, fingerprint : str
    started_s : float
    is_ready, is_draining : bool
    is_persisting : bool
        False after a save has failed, until one succeeds.
    num_running, num_prefilling, num_waiting : int
        Requests that are computed, those of them that still read their prompt, and that wait.
    tiers : tuple of TierState
    totals : Totals
    sessions : mapping of str to int
        By state.
    saved_bytes : int
        Of all tenants' sessions on disk.
    sharing : SharingState or None
        None: sessions are not shared.
    """

    model: str
    fingerprint: str
    started_s: float
    is_ready: bool
    is_draining: bool
    is_persisting: bool
    num_running: int
    num_prefilling: int
    num_waiting: int
    tiers: tuple[TierState, ...]
    totals: Totals
    sessions: Mapping[str, int]
    saved_bytes: int = 0
    sharing: SharingState | None = None
