"""Which sessions there are, whose, and which caches hold their keys and values."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from offload import OffloadedCache
from offload.daemon.errors import UnknownSession
from offload.daemon.work.token_log import TokenIds, TokenLog
from offload.errors import ClosedError


@dataclass(frozen=True, slots=True)
class Realm:
    """Within which keys and values may be shared.

    Attributes
    ----------
    tenant : str
    cache_salt : str or None
    """

    tenant: str
    cache_salt: str | None = None


@dataclass(eq=False, slots=True)
class Branch:
    """A cache in memory, and the tokens that are in it.

    Attributes
    ----------
    cache : OffloadedCache
    tokens : TokenLog
        As many as the cache holds, between two steps.
    realm : Realm
    session : Session or None
        None: what a session has left behind when it took another way, until room is needed.
    is_busy : bool
        A request is adding to it.
    used_s : float
    is_on_host : bool
        It has been moved off the device since it was last used.
    """

    cache: OffloadedCache
    tokens: TokenLog
    realm: Realm
    session: "Session | None" = None
    is_busy: bool = False
    used_s: float = field(default_factory=time.time)
    is_on_host: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether the cache can be used, and holds these tokens in every layer."""
        try:
            self.cache._core.check_open()
        except ClosedError:
            return False
        runtime = self.cache._core.runtime
        layers = () if runtime is None else runtime.layers.values()
        return {layer.num_tokens for layer in layers} in ({len(self.tokens)}, set())


@dataclass(slots=True)
class Saved:
    """What a store has of a session.

    Attributes
    ----------
    num_tokens : int
    num_bytes : int
    is_current : bool
        All of it is a beginning of what is in memory, or there is nothing in memory.
    saved_s : float
    """

    num_tokens: int
    num_bytes: int
    is_current: bool
    saved_s: float


@dataclass(eq=False, slots=True)
class Session:
    """A session of one tenant.

    Attributes
    ----------
    realm : Realm
        The salt is that of the request that wrote it last.
    name : str
    is_automatic : bool
        Nobody asked for it by name.
    is_pinned, ttl_s, created_s, used_s, parent, last_hit_share, num_requests
        As in ``SessionView``.
    branch : Branch or None
        None while it is nowhere but on disk, or empty.
    saved : Saved or None
    head : TokenIds or None
        Its first tokens; None where they have to be read from disk.
    dirty_since_s, failed_s : float or None
        Since when it has tokens that are not saved; when it could not be saved.
    """

    realm: Realm
    name: str
    is_automatic: bool = False
    is_pinned: bool = False
    ttl_s: float | None = None
    created_s: float = field(default_factory=time.time)
    used_s: float = field(default_factory=time.time)
    parent: str | None = None
    last_hit_share: float = 0.0
    num_requests: int = 0
    branch: Branch | None = None
    saved: Saved | None = None
    head: TokenIds | None = None
    dirty_since_s: float | None = None
    failed_s: float | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a request is adding to it."""
        return self.branch is not None and self.branch.is_busy

    @property
    def num_tokens(self) -> int:
        """Tokens of its latest state."""
        if self.branch is not None:
            return len(self.branch.tokens)
        return 0 if self.saved is None else self.saved.num_tokens

    @property
    def dirty_tokens(self) -> int:
        """Tokens in memory that no store has."""
        if self.branch is None:
            return 0
        if self.saved is None or not self.saved.is_current:
            return len(self.branch.tokens)
        return max(0, len(self.branch.tokens) - self.saved.num_tokens)

    @property
    def expires_s(self) -> float | None:
        """When it is deleted unless it is used before; None: never."""
        return None if self.ttl_s is None else self.used_s + self.ttl_s


class SessionBook:
    """All sessions and all caches in memory. Only the engine's thread uses it."""

    def __init__(self) -> None:
        self._sessions: dict[str, dict[str, Session]] = {}
        self.branches: list[Branch] = []

    def __iter__(self) -> Iterator[Session]:
        for sessions in list(self._sessions.values()):
            yield from list(sessions.values())

    def of(self, tenant: str) -> list[Session]:
        """Return a tenant's sessions, by name."""
        return [session for _, session in sorted(self._sessions.get(tenant, {}).items())]

    def find(self, tenant: str, name: str | None) -> Session | None:
        """Return a session, or None."""
        return None if name is None else self._sessions.get(tenant, {}).get(name)

    def get(self, tenant: str, name: str) -> Session:
        """Return a session, or raise UnknownSession."""
        found = self.find(tenant, name)
        if found is None:
            count = len(self._sessions.get(tenant, {}))
            raise UnknownSession(f"no session {name!r} among {count}")
        return found

    def add(self, session: Session) -> Session:
        """Add a session; its name is free."""
        self._sessions.setdefault(session.realm.tenant, {})[session.name] = session
        return session

    def remove(self, session: Session) -> None:
        """Forget a session; what it has in memory is nobody's then."""
        self.leave(session)
        del self._sessions[session.realm.tenant][session.name]

    def rename(self, session: Session, name: str) -> None:
        """Give a session another name, which is free."""
        sessions = self._sessions[session.realm.tenant]
        del sessions[session.name]
        session.name = name
        sessions[name] = session

    def leave(self, session: Session) -> None:
        """Part a session from what it has in memory."""
        if session.branch is not None:
            session.branch.session, session.branch = None, None

    def bind(self, session: Session, branch: Branch) -> None:
        """Make a branch what a session has in memory."""
        if session.branch is not branch:
            self.leave(session)
        session.branch, branch.session = branch, session
        session.realm = branch.realm

    def add_branch(self, branch: Branch) -> Branch:
        """Keep a branch."""
        self.branches.append(branch)
        return branch

    def close_branch(self, branch: Branch) -> None:
        """Close a branch's cache, and forget it."""
        if branch.session is not None:
            self.leave(branch.session)
        self.branches.remove(branch)
        branch.cache.close()

    def idle_branches(self) -> list[Branch]:
        """Return the branches that nobody is adding to, those first that are missed least."""
        idle = [branch for branch in self.branches if not branch.is_busy]

        def worth(branch: Branch) -> tuple[bool, bool, float]:
            session = branch.session
            return session is not None, session is not None and session.is_pinned, branch.used_s

        return sorted(idle, key=worth)
