"""Buckets and tiers of tests; pauses between tries take no time."""

from pathlib import Path
from typing import Any

from offload.tiers.remote import RemoteTier
from offload.tiers.remote_bucket import Bucket, Patience
from offload.types import PAGE_BYTES, ChunkLayout
from tests.support.s3_server import BUCKET, s3_options


class StillClock:
    """Seconds that pass only in pauses."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        """Let time pass."""
        self.pauses.append(seconds)
        self.now_s += seconds


def folder_bucket(folder: Path) -> Bucket:
    return Bucket(folder.as_uri())


def s3_bucket(port: int, prefix: str, clock: StillClock | None = None, **patience: Any) -> Bucket:
    clock = clock or StillClock()
    return Bucket(
        f"s3://{BUCKET}/{prefix}",
        patience=Patience(**{"deadline_s": 20.0, **patience}),
        options=s3_options(port),
        clock=clock,
        pause=clock.pause,
    )


def make_remote_tier(bucket: Bucket, num_slots: int, layout: ChunkLayout) -> RemoteTier:
    """Return a tier of exactly ``num_slots`` slots."""
    return RemoteTier(
        bucket,
        capacity_bytes=num_slots * (PAGE_BYTES + layout.slot_bytes),
        layout=layout,
        fingerprint=b"model",
        num_threads=3,
        deadline_s=30.0,
    )
