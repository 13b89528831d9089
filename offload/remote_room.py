"""Room in an object store below the disk: how it is opened, and what there is to say about it."""

from offload.engine_config import EngineConfig
from offload.stats import Counters, TierStats
from offload.table import ChunkTable
from offload.tiers.base import Tier
from offload.tiers.remote_below import DiskThenRemote, is_remote
from offload.types import ChunkLayout


def open_below(disk: Tier, config: EngineConfig, layout: ChunkLayout) -> Tier:
    """Return a disk tier with the remote one of a configuration below it.

    Raises
    ------
    ConfigError
        The URL is none that can be opened; ``disk`` is closed.
    """
    from offload.tiers.remote import RemoteTier  # with obstore, which is optional
    from offload.tiers.remote_bucket import Bucket, Patience

    assert config.remote_url is not None
    try:
        patience = Patience(deadline_s=config.deadline_s / 2)
        remote = RemoteTier(
            Bucket(config.remote_url, patience=patience),
            capacity_bytes=config.capacities["remote"],
            layout=layout,
            deadline_s=config.deadline_s,
        )
    except BaseException:
        disk.close()
        raise
    return DiskThenRemote(disk, remote)


def stats_of_both(
    tier: DiskThenRemote, table: ChunkTable, counters: Counters, level: int
) -> dict[str, TierStats]:
    """Return the statistics of the two tiers by name.

    Parameters
    ----------
    tier : DiskThenRemote
    table : ChunkTable
    counters : Counters
        Which count both as the disk.
    level : int
        Of the tier in the table.
    """
    slots = [slot for chunk in table if (slot := table[chunk].slots.get(level)) is not None]
    num_far = sum(map(is_remote, slots))
    loaded, stored = counters.loaded_bytes.get("disk", 0), counters.stored_bytes.get("disk", 0)
    return {
        "disk": TierStats(
            used_bytes=tier.disk.used_bytes,
            peak_bytes=tier.disk_peak_bytes,
            capacity_bytes=tier.disk.capacity_bytes,
            num_chunks=len(slots) - num_far,
            loaded_bytes=max(0, loaded - tier.loaded_bytes),
            stored_bytes=max(0, stored - tier.stored_bytes),
        ),
        "remote": TierStats(
            used_bytes=tier.remote.used_bytes,
            peak_bytes=tier.remote_peak_bytes,
            capacity_bytes=tier.remote.capacity_bytes,
            num_chunks=num_far,
            loaded_bytes=tier.loaded_bytes,
            stored_bytes=tier.stored_bytes,
        ),
    }
