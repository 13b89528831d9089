"""A saved stream that another process may still be encoding."""

import time
from typing import Any

from offload.sessions.store import SessionStore
from offload.video.adapter import VideoAdapter
from offload.video.stream_session import StreamSession


class StreamFollower:
    """Has the newest state of a stream open. One thread.

    Parameters
    ----------
    adapter : VideoAdapter
    name : str
    store : SessionStore
        Stays open.
    refresh_s : float
        Look no more often than this whether more was saved.
    **options
        For ``VideoStream``.

    Raises
    ------
    SessionNotFound, NamespaceMismatch
    """

    def __init__(
        self,
        adapter: VideoAdapter,
        name: str,
        store: SessionStore,
        *,
        refresh_s: float = 10.0,
        **options: Any,
    ) -> None:
        self._adapter, self._name, self._store = adapter, name, store
        self._refresh_s, self._options = refresh_s, options
        self._saved_at = store.info(name).created_at
        self.session = self._open()
        self._looked_at = time.monotonic()

    def refresh(self) -> bool:
        """Open the stream anew if more of it was saved; return whether it was."""
        if time.monotonic() - self._looked_at < self._refresh_s:
            return False
        saved_at = self._store.info(self._name).created_at
        self._looked_at = time.monotonic()
        if saved_at == self._saved_at:
            return False
        # One after the other: both at once might not fit into the tiers.
        self.session.close()
        self.session, self._saved_at = self._open(), saved_at
        return True

    def close(self) -> None:
        """Close the stream. Idempotent."""
        self.session.close()

    def _open(self) -> StreamSession:
        return StreamSession.load(self._adapter, self._name, self._store, **self._options)
