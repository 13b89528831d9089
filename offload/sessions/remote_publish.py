"""Publish a session: upload what the store does not have, then name it in the manifest."""

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.errors import SessionInUse, StorageError
from offload.sessions.remote_garbage import read_condemned
from offload.sessions.remote_leases import RemoteLeases
from offload.sessions.remote_local import open_root, open_source
from offload.sessions.remote_manifest import Manifest, block_name
from offload.sessions.remote_upload import Uploader
from offload.sessions.session_file import SessionFile
from offload.sessions.store import SessionStore
from offload.tiers.remote_bucket import Bucket


@dataclass(frozen=True, slots=True)
class PublishReport:
    """A session that was published.

    Attributes
    ----------
    name : str
    epoch : int
        Of its owner.
    num_blocks, written_blocks : int
        In all, and those that the store did not have.
    content_bytes, written_bytes : int
        Of the chunks of the blocks that were written, before and after compression.
    seconds : float
    """

    name: str
    epoch: int
    num_blocks: int
    written_blocks: int
    content_bytes: int
    written_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes sessions; see ``RemoteSessions``, whose arguments these are.

    Attributes
    ----------
    bucket : Bucket
    leases : RemoteLeases
    clock : callable
    grace_s : float
    num_threads : int
    compress : bool
    """

    bucket: Bucket
    leases: RemoteLeases
    clock: Callable[[], float]
    grace_s: float
    num_threads: int
    compress: bool

    def publish(
        self,
        store: SessionStore | str | Path,
        name: str,
        seen: str | None,
        progress: Callable[[int, int], object],
        *,
        overwrite: bool,
        rewrite: bool,
        notes: Mapping[str, Any],
        may_release: Callable[[], bool],
    ) -> tuple[PublishReport, Manifest]:
        """Publish one; ``seen`` is the session file that this owner has last seen of it."""
        started = time.monotonic()

        def advance(done: int, total: int) -> None:
            self.leases.keep(name)
            progress(done, total)

        with open_root(store) as root, open_source(root, name) as (file, source):
            known = self.leases.held(name) or self.leases.take(name)
            if not overwrite:
                _refuse_other(known, file, seen, self.clock())
            uploader = Uploader(
                self.bucket,
                file,
                read_condemned(self.bucket),
                known.blocks if known.is_live(self.clock()) else (),
                num_threads=self.num_threads,
                compress=self.compress,
                rewrite=rewrite,
            )
            blocks = uploader.upload(source, advance)
            published = _describe(file, blocks, *uploader.upload_file())
            self._refuse_late(name, time.monotonic() - started)
            published["notes"] = dict(notes)
            if may_release():
                published["lease_until"] = 0.0
            manifest = self.leases.change(name, **published)
            if not manifest.lease_until:
                self.leases.forget(name)
        report = PublishReport(
            name=name,
            epoch=manifest.epoch,
            num_blocks=len(blocks),
            written_blocks=uploader.written_blocks,
            content_bytes=uploader.written_blocks * len(file.layers) * file.layout.chunk_bytes,
            written_bytes=uploader.written_bytes,
            seconds=time.monotonic() - started,
        )
        return report, manifest

    def _refuse_late(self, name: str, seconds: float) -> None:
        if seconds > self.grace_s / 2:
            raise StorageError(
                errno.ETIMEDOUT,
                f"publication of {name!r} to {self.bucket.url} took {seconds:.0f} s, at most half "
                f"of grace_s={self.grace_s} s is safe; publish again, what was uploaded is there",
            )


def _refuse_other(found: Manifest, file: SessionFile, seen: str | None, now_s: float) -> None:
    """Raise SessionInUse if a session would be replaced that this one does not go on from.

    Parameters
    ----------
    found : Manifest
        The newest.
    file : SessionFile
        What is to replace it.
    seen : str or None
        The session file that this owner has last published or fetched.
    now_s : float
    """
    if not found.is_live(now_s) or found.file == seen:
        return
    if not goes_on(file, found):
        raise SessionInUse(
            f"{file.name!r} was published with {found.num_tokens} tokens (epoch {found.epoch}), "
            f"and this one of {file.num_tokens} tokens does not go on from it; fetch it, publish "
            "under another name, or overwrite it"
        )


def goes_on(file: SessionFile, found: Manifest) -> bool:
    """Whether a local session has all the full blocks of a published one, and as many tokens."""
    ours = {block_name(file.namespace.digest, ref.key) for row in file.rows for ref in row}
    has_all = ours.issuperset(f"{name.rpartition('-')[0]}-0" for name in found.blocks)
    return has_all and found.num_tokens <= file.num_tokens


def _describe(
    file: SessionFile, blocks: tuple[str, ...], name: str, num_bytes: int
) -> dict[str, Any]:
    """Return what a manifest says of a session whose objects are there."""
    return {
        "file": name,
        "file_bytes": num_bytes,
        "namespace": file.namespace.digest.hex(),
        "num_tokens": file.num_tokens,
        "num_layers": len(file.layers),
        "chunk_bytes": file.layout.chunk_bytes,
        "blocks": blocks,
        "expires_at": file.expires_at,
        "is_deleted": False,
    }
