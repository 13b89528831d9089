"""What an object store knows about its sessions."""

from dataclasses import dataclass

from offload.sessions.remote_log import ManifestLog


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
    """

    name: str
    num_tokens: int
    num_blocks: int
    epoch: int
    owner: str | None
    expires_at: float | None


def list_remote(log: ManifestLog, now_s: float) -> list[RemoteInfo]:
    """Return the sessions that can be fetched, by name.

    Raises
    ------
    CorruptChunk
        A manifest is damaged.
    """
    newest = [log.read(versions[-1]) for versions in log.all().values()]
    return [
        RemoteInfo(
            name=each.name,
            num_tokens=each.num_tokens,
            num_blocks=len(each.blocks),
            epoch=each.epoch,
            owner=each.owner if each.lease_until > now_s else None,
            expires_at=each.expires_at,
        )
        for each in sorted(newest, key=lambda each: each.name)
        if each.is_live(now_s)
    ]
