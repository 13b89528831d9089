"""A session as it is shown."""

from offload.daemon.requests import CachedTokens
from offload.daemon.state import SessionState, SessionView
from offload.daemon.work.residency import num_bytes, residency
from offload.daemon.work.session_book import Session


def view_of(session: Session) -> SessionView:
    """Return what is to be seen of a session now."""
    branch = session.branch
    if branch is not None:
        tokens, size = residency(branch.cache, len(branch.tokens)), num_bytes(branch.cache)
    elif session.saved is not None:
        tokens, size = CachedTokens(disk=session.saved.num_tokens), session.saved.num_bytes
    else:
        tokens, size = CachedTokens(), 0
    return SessionView(
        name=session.name,
        num_tokens=session.num_tokens,
        tokens=tokens,
        size_bytes=size,
        dirty_tokens=session.dirty_tokens,
        state=state_of(session, tokens),
        is_pinned=session.is_pinned,
        ttl_s=session.ttl_s,
        expires_s=session.expires_s,
        created_s=session.created_s,
        last_used_s=session.used_s,
        parent=session.parent,
        last_hit_share=session.last_hit_share,
        num_requests=session.num_requests,
    )


def state_of(session: Session, tokens: CachedTokens | None = None) -> SessionState:
    """Return where a session is; without ``tokens``, as far as is known at no cost."""
    if session.is_busy:
        return "running"
    if session.branch is None:
        return "disk" if session.saved is not None else "device"
    if session.branch.is_on_host:
        return "host"
    if tokens is None or tokens.device or not tokens.total:
        return "device"
    return "host" if tokens.host else "disk"
