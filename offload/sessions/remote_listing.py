"""What an object store knows about its sessions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from offload.sessions.remote_log import ManifestLog
from offload.sessions.remote_manifest import Manifest


@dataclass(frozen=True, slots=True)
class RemoteInfo:
    """One session of an object store.

    Attributes
    ----------
    name : str
    num_tokens : int
        Per row.
    num_blocks : int
    epoch : int
    owner : str or None
        Who may write it now; None: anybody may take it.
    expires_at : float or None
        Seconds since 1970.
    num_bytes : int
        Of its chunks, shared or not.
    file : str
        Another one after every publication.
    number : int
        Of the version of its manifest.
    notes : mapping
        Of who has published it.
    """

    name: str
    num_tokens: int
    num_blocks: int
    epoch: int
    owner: str | None
    expires_at: float | None
    num_bytes: int
    file: str
    number: int
    notes: Mapping[str, Any]


def read_newest(log: ManifestLog, known: Mapping[str, Manifest]) -> dict[str, Manifest]:
    """Return the newest version of every session's manifest, by the name of its object.

    Parameters
    ----------
    log : ManifestLog
    known : mapping of str to Manifest
        Versions that need not be read: they never change.

    Raises
    ------
    CorruptChunk
        A manifest is damaged.
    """
    newest = [versions[-1] for versions in log.all().values()]
    return {found.name: known.get(found.name) or log.read(found) for found in newest}


def list_remote(newest: Iterable[Manifest], now_s: float) -> list[RemoteInfo]:
    """Return the sessions that can be fetched, by name."""
    return [
        RemoteInfo(
            name=each.name,
            num_tokens=each.num_tokens,
            num_blocks=len(each.blocks),
            epoch=each.epoch,
            owner=each.owner if each.lease_until > now_s else None,
            expires_at=each.expires_at,
            num_bytes=len(each.blocks) * each.num_layers * each.chunk_bytes,
            file=each.file,
            number=each.number,
            notes=each.notes,
        )
        for each in sorted(newest, key=lambda each: each.name)
        if each.is_live(now_s)
    ]
