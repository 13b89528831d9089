"""The versions of a session's manifest: who reads the newest, and who may write the next."""

import secrets
from dataclasses import replace
from typing import Any

from offload.errors import CorruptChunk, SessionInUse, SessionNotFound
from offload.sessions.remote_manifest import SESSIONS, Manifest, folder_of, parse_manifest
from offload.tiers.remote_bucket import Bucket, Found

_MAX_READS = 8
"""A version that goes between the listing and the read has a successor; so often in a row, not."""


class ManifestLog:
    """Manifests of all sessions of one object store. Any thread may call any method.

    Invariant: of each session there is one newest version, and only who knew the one before can
    have made it. Versions are removed by the garbage collector alone, and never the newest.

    Parameters
    ----------
    bucket : Bucket
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def newest(self, name: str) -> Manifest | None:
        """Return the newest version of a session's manifest, deleted or not; None: there is none.

        Raises
        ------
        CorruptChunk
            It is damaged.
        """
        for num_left in reversed(range(_MAX_READS)):
            names = [each.name for each in self._bucket.list(folder_of(name)) if is_manifest(each)]
            if not names:
                return None
            try:
                content = self._bucket.get(names[-1])
            except CorruptChunk:
                if num_left:
                    continue
                raise
            manifest = parse_manifest(content, f"{self._bucket.url}/{names[-1]}")
            if manifest.object_name != names[-1] or manifest.name != name:
                raise CorruptChunk(
                    f"{self._bucket.url}/{names[-1]} is version {manifest.number} of "
                    f"{manifest.name!r}"
                )
            return manifest
        raise AssertionError("the last round returns or raises")

    def find(self, name: str, now_s: float) -> Manifest:
        """Return the newest version of a session that can be opened.

        Raises
        ------
        SessionNotFound
        """
        found = self.newest(name)
        if found is None or not found.is_live(now_s):
            raise SessionNotFound(f"{self._bucket.url} has no session {name!r}")
        return found

    def all(self) -> dict[str, list[Found]]:
        """Return the versions of every session, oldest first, by folder."""
        found: dict[str, list[Found]] = {}
        for each in self._bucket.list(SESSIONS):
            if is_manifest(each):
                found.setdefault(each.name.rpartition("/")[0], []).append(each)
        return found

    def read(self, found: Found) -> Manifest:
        """Return a version of a listing.

        Raises
        ------
        CorruptChunk
            It is damaged, or gone.
        """
        return parse_manifest(self._bucket.get(found.name), f"{self._bucket.url}/{found.name}")

    def append(self, known: Manifest, **changes: Any) -> Manifest:
        """Write the version after one that the caller has read or written.

        Parameters
        ----------
        known : Manifest
            Number 0 is that of a session that does not exist yet.
        **changes
            What differs.

        Returns
        -------
        Manifest
            The newest version now.

        Raises
        ------
        SessionInUse
            Somebody else has written a version since. Nothing has changed.
        StorageError
            It may have been written all the same; ``newest`` tells.
        """
        nonce = secrets.token_hex(8)
        place = {"number": known.number + 1, "nonce": nonce, "previous": known.nonce}
        following = replace(known, **{**changes, **place})
        content = following.pack()
        self._refuse_stale(known, self.newest(known.name))
        if not self._bucket.create(following.object_name, content):
            found = self._bucket.get(following.object_name)
            if found != content:  # else an earlier try has written it, and its answer was lost
                self._refuse_stale(known, parse_manifest(found, following.object_name))
        newest = self.newest(known.name)
        if newest is None or (newest.number > following.number and not self._has_next(following)):
            # Ours fills the place of a version that the garbage collector has removed.
            self._refuse_stale(known, newest)
        return following

    def _has_next(self, written: Manifest) -> bool:
        """Whether somebody has gone on from a version already, which has let go of the session."""
        name = replace(written, number=written.number + 1).object_name
        try:
            found = parse_manifest(self._bucket.get(name), f"{self._bucket.url}/{name}")
        except CorruptChunk:
            return False
        return found.previous == written.nonce

    def _refuse_stale(self, known: Manifest, newest: Manifest | None) -> None:
        number = 0 if newest is None else newest.number
        if number == known.number and (newest is None or newest.nonce == known.nonce):
            return
        by = "nobody" if newest is None else f"{newest.owner} (epoch {newest.epoch})"
        raise SessionInUse(
            f"session {known.name!r} in {self._bucket.url} was changed by {by}: its manifest is at "
            f"version {number}, we go on from version {known.number} of epoch {known.epoch}; "
            "nothing was written"
        )


def is_manifest(found: Found) -> bool:
    """Whether an object of a session's folder is a version of its manifest."""
    return found.name.endswith(".json")
