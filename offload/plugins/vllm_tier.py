"""Our disk as a secondary tier of vLLM's tiered KV offloading, for vLLM 0.29 to 0.33.

vLLM loads it by name; see ``docs/plugins.md``. It knows nothing of the GPU: vLLM copies between the
GPU and its own CPU tier, and this tier between that memory and the disk.
"""

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offload.config import format_size, parse_size
from offload.errors import ConfigError
from offload.plugins.batch import Batch, Row
from offload.plugins.block_store import BlockStore
from offload.plugins.mover import BlockStats
from offload.plugins.namespace import Namespace

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import (
        LookupResult,
        Medium,
        OffloadingCounterMetadata,
        RequestOffloadingContext,
    )
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ConfigError(
        "offload.plugins.vllm_tier is loaded by vLLM 0.29 to 0.33, and cannot be without it: "
        f"{error}"
    ) from error

_METRIC = "vllm:kv_offload_disk_"
_COUNTERS = {
    "num_stored": ("blocks_stored", "Blocks written to the disk tier."),
    "num_loaded": ("blocks_loaded", "Blocks read from the disk tier and verified."),
    "num_evicted": ("blocks_evicted", "Blocks evicted from the disk tier to keep its quota."),
    "num_corrupt": ("blocks_corrupt", "Blocks found damaged, and set aside."),
    "num_failed": ("blocks_failed", "Blocks that the disk refused to write or read."),
    "num_given_up": ("blocks_given_up", "Blocks that missed the deadline of the disk tier."),
    "num_refused": (
        "blocks_refused",
        "Blocks not stored: no room in use by nobody, or disk hangs.",
    ),
}
_RESULT_FIELDS = frozenset(field.name for field in dataclasses.fields(JobResult))


class OffloadTier(SecondaryTierManager):  # type: ignore[misc]  # vLLM is not installed here
    """A bounded, checksummed disk tier that survives restarts.

    All methods are called by vLLM's scheduler, one at a time; none but ``drain_jobs`` and
    ``shutdown`` blocks. A block on its way to the disk is not found until it is there.

    Parameters
    ----------
    offloading_spec, primary_kv_view, tier_type, backpressure_detector
        From vLLM. The view has shape ``[num_chunks, row_bytes]``.
    root : str
        Folder; each model and layout gets one of its own in it.
    quota : int or str
        Bytes that a model and layout may take up there, such as ``"500GiB"``.
    num_threads : int
    deadline_s : float
        After so long a transfer is given up: the block is recomputed, or not stored.

    Raises
    ------
    ConfigError
        The folder cannot be used, or the quota is no size or less than one block.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        root: str,
        quota: int | str,
        num_threads: int = 4,
        deadline_s: float = 30.0,
        backpressure_detector: Any = None,
        locality: str | None = None,
    ) -> None:
        # Versions before 0.32 know no detector.
        detector = () if backpressure_detector is None else (backpressure_detector,)
        super().__init__(offloading_spec, primary_kv_view, tier_type, *detector)
        if locality not in (None, "LOCAL"):
            raise ConfigError(f"a disk tier is LOCAL, not {locality!r}")
        self._rows: Row | None = np.frombuffer(primary_kv_view, np.uint8).reshape(
            primary_kv_view.shape
        )
        self._quota_bytes = parse_size(quota)
        namespace = _namespace_of(offloading_spec, self._rows.shape[1])
        self._store = BlockStore(
            Path(root).expanduser(),
            namespace,
            quota_bytes=self._quota_bytes,
            num_threads=num_threads,
            deadline_s=deadline_s,
        )
        self._jobs: dict[int, tuple[Batch, Any]] = {}
        self._reported = BlockStats()

    @property
    def store(self) -> BlockStore:
        """What holds the blocks."""
        return self._store

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """Return HIT if a block can be loaded, else MISS."""
        return LookupResult.HIT if self._store.holds(key) else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        """Start to write blocks from the CPU tier."""
        batch = self._store.submit_store(job_metadata.keys, self._rows_of(job_metadata))
        self._jobs[job_metadata.job_id] = (batch, job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        """Start to read blocks into the CPU tier."""
        batch = self._store.submit_load(job_metadata.keys, self._rows_of(job_metadata))
        self._jobs[job_metadata.job_id] = (batch, job_metadata)

    def get_finished_jobs(self) -> Iterable[Any]:
        """Return what ended since the last call; blocks that failed are named one by one."""
        self._store.poll()
        over = [job_id for job_id, (batch, _) in self._jobs.items() if batch.is_over]
        return [self._result(job_id, *self._jobs.pop(job_id)) for job_id in over]

    def has_pending_work(self) -> bool:
        """Whether a job is still to be reported."""
        return bool(self._jobs)

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Make blocks the most recently used."""
        self._store.touch(keys)

    def on_new_request(self, req_context: Any) -> Any:
        """Ask for every new block, as vLLM does by default."""
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        """Block until no job touches the CPU tier, ``deadline_s`` at most."""
        self._store.drain()

    def shutdown(self) -> None:
        """Finish or give up all jobs, and let another process have the folder."""
        try:
            self._store.close()
        finally:
            # Else vLLM could not release its view of the memory. No batch has rows any more.
            self._rows = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return the counters of ``get_stats``."""
        return {
            _METRIC + name: OffloadingCounterMetadata(documentation=text)
            for name, text in _COUNTERS.values()
        }

    def get_stats(self) -> Any:
        """Return what has been counted since the last call, None if nothing."""
        now, before = self._store.stats, self._reported
        self._reported = now
        stats = OffloadingConnectorStats()
        for field, (name, _) in _COUNTERS.items():
            if increase := getattr(now, field) - getattr(before, field):
                stats.increase_counter(_METRIC + name, increase)
        return None if stats.is_empty() else stats

    @classmethod
    def config_info_keys(cls, tier_config: dict[str, Any]) -> tuple[str, ...]:
        """Return the names in ``config_info``."""
        return ("disk_root", "disk_quota", "disk_namespace", "disk_block_bytes")

    def config_info(self) -> dict[str, str | int]:
        """Return where the blocks are, how much room they have, and how large they are."""
        return {
            "disk_root": str(self._store.folder.parent),
            "disk_quota": format_size(self._quota_bytes),
            "disk_namespace": self._store.folder.name,
            "disk_block_bytes": self._store.namespace.row_bytes,
        }

    def _rows_of(self, job: Any) -> Sequence[Row]:
        assert self._rows is not None
        # Renamed in 0.32.
        numbers = job.chunk_ids if hasattr(job, "chunk_ids") else job.block_ids
        return [self._rows[int(number)] for number in numbers]

    def _result(self, job_id: int, batch: Batch, job: Any) -> Any:
        results = batch.results
        arrived = [key for key, good in zip(job.keys, results, strict=True) if good]
        fields = {
            "job_id": job_id,
            "success": len(arrived) == len(results),
            "successful_keys": arrived if job.is_promotion and arrived else None,
            "transfer_time": batch.ended_s - batch.begun_s,
            "transfer_bytes": len(arrived) * self._store.namespace.row_bytes,
        }
        return JobResult(**{name: fields[name] for name in fields.keys() & _RESULT_FIELDS})


def _namespace_of(spec: Any, row_bytes: int) -> Namespace:
    """Return what blocks of this engine have in common with those of others that are like it."""
    config = spec.config
    parallel = config.parallel
    details = {
        "groups": [[group.tokens_per_block, list(group.layer_names)] for group in config.groups],
        "tokens_per_hash": config.cache.tokens_per_hash,
        "parallel": [parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
        "replica": parallel.data_parallel_index,
        "layout": [
            getattr(config, "replicated_layout", False),
            getattr(config, "canonical_layout", False),
            getattr(config, "kv_cache_layout", None),
        ],
    }
    return Namespace(
        engine="vllm",
        model=config.model.name,
        dtype=str(config.model.dtype),
        row_bytes=row_bytes,
        block_tokens=config.cache.tokens_per_hash * config.cache.blocks_per_chunk,
        tp_rank=parallel.rank,
        tp_size=parallel.tp_size,
        details=json.dumps(details, sort_keys=True),
    )
