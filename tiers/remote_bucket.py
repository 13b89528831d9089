"""An object store, with patience: every call is tried until a deadline, and then says why not."""

import errno
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import obstore

from offload.errors import ClosedError, CorruptChunk, StorageError
from offload.tiers.remote_errors import (
    REFUSALS,
    Refusal,
    as_ours,
    classify,
    describe,
)
from offload.tiers.remote_url import open_store, without_secrets

_DELETE_BATCH = 1000
"""What S3 deletes in one request."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on trying.

    Attributes
    ----------
    deadline_s : float
        From the first try of a call to the start of its last one.
    request_s : float
        Longest single request, from connecting to the last byte of the answer.
    first_s, most_s : float
        Longest pause before the second try, and before any. Each pause is drawn evenly from zero to
        twice the one before it, so that many clients that were refused together come back apart.
    """

    deadline_s: float = 60.0
    request_s: float = 20.0
    first_s: float = 0.1
    most_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Found:
    """An object of a listing.

    Attributes
    ----------
    name : str
    num_bytes : int
    modified_at : float
        Seconds since 1970, by the clock of the store.
    """

    name: str
    num_bytes: int
    modified_at: float


class Bucket:
    """Objects below one URL. Any thread may call any method.

    Objects are created once and never changed, except by ``replace``. A call that is refused for a
    while (5xx, throttling, a broken connection, an answer cut short) is repeated; every call is
    such that doing it twice is as good as once.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, ``gs://``, ``az://``, ``file:///folder`` or ``memory:///``.
        Credentials, endpoint and region come from the environment, as the store's own tools have
        them (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).
    patience : Patience
    options : mapping, optional
        Of ``obstore``, such as ``{"endpoint": "http://localhost:9000"}``.
    clock : callable
        Seconds, for deadlines.
    pause : callable, optional
        Waits so many seconds; by default ``close`` ends the wait.

    Raises
    ------
    ConfigError
        The URL or an option is none that ``obstore`` knows.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: Patience | None = None,
        options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self.url = without_secrets(url)
        self.patience = patience or Patience()
        self._clock = clock
        self._closing = threading.Event()
        self._pause = self._closing.wait if pause is None else pause
        self._random = random.Random()
        self._store = open_store(url, self.patience.request_s, options or {})

    def get(self, name: str) -> bytes:
        """Return an object.

        Raises
        ------
        CorruptChunk
            There is none.
        StorageError
        """
        return self._call("read of", name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def get_range(self, name: str, start: int, num_bytes: int) -> bytes:
        """Return part of an object, all of it.

        Raises
        ------
        CorruptChunk
            There is no object, or it ends before.
        StorageError
        """
        end = start + num_bytes
        content = self._call(
            f"read of bytes {start} to {end} of",
            name,
            lambda: bytes(obstore.get_range(self._store, name, start=start, end=end)),
        )
        if len(content) != num_bytes:
            raise CorruptChunk(
                f"{self.url}/{name} ends after {start + len(content)} bytes, {end} were expected"
            )
        return content

    def create(self, name: str, content: bytes) -> bool:
        """Write an object, unless there is one.

        Returns
        -------
        bool
            Whether it was written. False also if an earlier try had written it and its answer was
            lost: where that matters, compare.
        """
        return self._put(name, content, "create")

    def replace(self, name: str, content: bytes) -> None:
        """Write an object, whatever was there."""
        self._put(name, content, "overwrite")

    def find(self, name: str) -> Found | None:
        """Return what there is to say about an object, or None if there is none."""
        try:
            meta = self._call("look at", name, lambda: obstore.head(self._store, name))
        except CorruptChunk:
            return None
        return _found(meta)

    def list(self, prefix: str) -> list[Found]:
        """Return all objects below a prefix of whole path segments, by name."""

        def collect() -> list[Found]:
            pages = obstore.list(self._store, prefix, chunk_size=_DELETE_BATCH)
            return [_found(meta) for page in pages for meta in page]

        found = self._call("listing of", prefix, collect)
        return sorted(found, key=lambda each: each.name)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, those that are there."""
        for start in range(0, len(names), _DELETE_BATCH):
            part = list(names[start : start + _DELETE_BATCH])
            try:
                self._delete(part)
            except CorruptChunk:  # a folder stops at the first that is missing
                for name in part:
                    self._delete_one(name)

    def close(self) -> None:
        """End every pause between tries; calls fail from now on. Idempotent."""
        self._closing.set()

    def _put(self, name: str, content: bytes, mode: Any) -> bool:
        def put() -> bool:
            # Not in parts: an object has to be there whole or not at all, under a condition.
            obstore.put(self._store, name, content, mode=mode, use_multipart=False)
            return True

        return self._call(f"write of {len(content)} bytes to", name, put, exists=False)

    def _delete(self, names: Sequence[str]) -> None:
        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        self._call("removal of", what, lambda: obstore.delete(self._store, names))

    def _delete_one(self, name: str) -> None:
        if self.find(name) is not None:
            self._call("removal of", name, lambda: obstore.delete(self._store, name))

    def _call(
        self, verb: str, name: str, call: Callable[[], _T], *, exists: _T | None = None
    ) -> _T:
        """Call until it works; ``exists`` is the answer where there is such an object."""
        what, started, limit_s = f"{verb} {self.url}/{name}", self._clock(), self.patience.first_s
        num_tries = 0
        while True:
            if self._closing.is_set():
                raise ClosedError(f"{what}: the store was closed")
            num_tries += 1
            try:
                return call()
            except REFUSALS as error:
                refusal = classify(error)
                if refusal is Refusal.MISSING:
                    raise CorruptChunk(f"{what}: there is no such object") from error
                if refusal is Refusal.EXISTS and exists is not None:
                    return exists
                if refusal is not Refusal.PASSING:
                    raise as_ours(error, what) from error
                pause_s, waited_s = self._random.uniform(0, limit_s), self._clock() - started
                if waited_s + pause_s > self.patience.deadline_s:
                    # No TransferTimeout: that one says that a transfer is still under way.
                    raise StorageError(
                        errno.ETIMEDOUT,
                        f"{what}: given up after {num_tries} tries in {waited_s:.1f} s, at most "
                        f"{self.patience.deadline_s} s; the last one: {describe(error)}",
                    ) from error
            self._pause(pause_s)
            limit_s = min(2 * limit_s, self.patience.most_s)


def _found(meta: Mapping[str, Any]) -> Found:
    return Found(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp())
