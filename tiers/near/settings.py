"""How storage-side workers are set up."""

import os
from dataclasses import dataclass

from offload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class NearSettings:
    """How storage-side workers are set up.

    Attributes
    ----------
    workers_per_path : int
        Of each path; KV heads are divided among all of them.
    num_threads : int
        Of each worker: that attend, and that read and write. More than cores, because most wait
        for the disk.
    block_tokens : int
        Of a block of channels: a run of one channel is as many bytes, and reads are as long.
    memory_bytes : int
        Of each worker, for channels of blocks that are not full, and for what it has read lately.
    shared_bytes : int
        Of each worker, for chunks on their way.
    cpus_per_worker : int
        Cores that a worker stays on, its own where there are enough; 0 leaves that to the system.
    patience_s : float
        A worker that has not answered for so long is killed, and another one asked.
    """

    workers_per_path: int = 1
    num_threads: int = 4
    block_tokens: int = 8192
    memory_bytes: int = 256 << 20
    shared_bytes: int = 32 << 20
    cpus_per_worker: int = 0
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("workers_per_path", "num_threads", "block_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.patience_s <= 0:
            raise ConfigError(f"patience_s must be positive, not {self.patience_s}")

    def cpus_of(self, worker: int) -> tuple[int, ...]:
        """Return the cores that a worker stays on; none where it may use all."""
        if not self.cpus_per_worker or not hasattr(os, "sched_getaffinity"):
            return ()
        cores = sorted(os.sched_getaffinity(0))
        first = worker * self.cpus_per_worker
        return tuple(
            sorted({cores[i % len(cores)] for i in range(first, first + self.cpus_per_worker)})
        )
