"""What the forks of one cache share: tiers, store, staging, and the device memory they divide."""

import threading

import torch

from offload.engine_config import AUTO, EngineConfig
from offload.errors import CapacityError
from offload.exchange import BUFFERS_EACH, open_exchange
from offload.in_place import InPlace
from offload.loader import StagingLoader
from offload.pipeline_control import PipelineControl
from offload.pipeline_start import open_control
from offload.placement import FIRST
from offload.prefetch.stream import ChunkStream
from offload.remote_room import open_below
from offload.sparse.importance import ImportanceWatch
from offload.sparse.retrieval import Retrieval
from offload.sparse.row_plan import RowMemory
from offload.sparse.row_reader import RowReader
from offload.stats import Counters, RowStats
from offload.store import ChunkStore
from offload.tier_codecs import TierCodecs
from offload.tiers.base import Tier
from offload.tiers.disk import DiskTier
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.tiers.near.disk import NearDisk
from offload.tiers.pinned import PinnedRegion
from offload.tiers.pool import page_aligned
from offload.types import ChunkLayout
from offload.working_set import MOST_EXCHANGES, WorkingSet, plan_row_memory, plan_working_set


class Engine:
    """Tiers, store and staging of one cache and its forks.

    Invariant: on the device, tails + staging + pool never exceed the capacity. ``lock`` serialises
    the forks; whoever calls anything here or in ``store`` holds it.

    Parameters
    ----------
    config : EngineConfig
    layout : ChunkLayout
    batch : int
        Rows of the first runtime.
    num_layers : int
        Layers that will share the tiers.
    device : torch.device
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: ChunkLayout,
        batch: int,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.layout = layout
        self.device = device
        self.counters = Counters()
        self.lock = threading.RLock()
        self._tails: dict[int, int] = {}
        self._num_users = 0
        tail_bytes = num_layers * batch * layout.chunk_bytes
        sizes = self._plan(tail_bytes, batch)
        self._host_extra_bytes = 0
        self._row_memory = RowMemory()
        self._num_layers = num_layers
        self.disk: DiskTier | None = None
        """The disk tier, if there is one: it can adopt the records of saved sessions."""
        self._codecs = TierCodecs(config, layout, sizes.num_write_buffers + sizes.num_exchanges)
        self.near: NearDisk | None = None
        """The disk tier, if it attends."""
        self.in_place: InPlace | None = None
        self.tiers = self._build_tiers(sizes, tail_bytes)
        try:
            self._open(sizes)
        except BaseException:
            for tier in self.tiers:
                tier.close()
            raise

    def _open(self, sizes: WorkingSet) -> None:
        config, layout = self.config, self.layout
        self._write_memory = page_aligned(sizes.num_write_buffers * layout.slot_bytes)
        self._pinned_writes = PinnedRegion(self._write_memory)
        if self.device.type == "cuda":  # which reads rows of chunks that are being written
            self._pinned_writes.lock(0, self._write_memory.numel())
        self.store = ChunkStore(
            self.tiers,
            [config.preset.eviction() for _ in self.tiers],
            layout,
            list(self._write_memory.view(sizes.num_write_buffers, layout.slot_bytes)),
            self.counters,
            config.deadline_s,
        )
        self._peaks = [0] * len(self.tiers)
        self.pipeline = self._open_pipeline()
        self.rows = self._open_rows()
        if self.near is not None:
            assert config.preset.near is not None
            self.in_place = InPlace(self.store, self.near, config.preset.near, config.deadline_s)
        self.exchange = open_exchange(config.placement, self.store, sizes.num_exchanges)
        watching = (self._codecs.importance, self.exchange)
        reports = [each for each in watching if each is not None]
        sparse = config.preset.sparse
        self.retrieval = (
            None
            if sparse is None
            else Retrieval(
                self.store,
                self.rows,
                self.device,
                sparse,
                config.preset.rows.max_wait_s,
                None if config.scratch is None else config.scratch.path,
                ImportanceWatch(layout, [each.observe for each in reports]) if reports else None,
            )
        )
        self._open_staging(sizes)

    @property
    def is_in_use(self) -> bool:
        """Whether some cache still holds on to the engine."""
        return self._num_users > 0

    @property
    def is_shared(self) -> bool:
        """Whether several caches hold on to the engine."""
        return self._num_users > 1

    @property
    def device_pool(self) -> MemoryTier | None:
        """The device tier, if there is one."""
        first = self.tiers[0]
        return first if isinstance(first, MemoryTier) and first.name == "gpu" else None

    @property
    def num_readable(self) -> int:
        """Tiers, from the first, whose chunks compute reads where they are.

        On a CPU these are all in memory; a CUDA device reads the others through staging.
        """
        last = "cpu" if self.device.type == "cpu" else "gpu"
        names = [tier.name for tier in self.tiers]
        return names.index(last) + 1 if last in names else int("gpu" in names)

    @property
    def tail_bytes(self) -> int:
        """Device bytes reserved for the tails of all forks."""
        return sum(self._tails.values())

    def beside_chunks_bytes(self, tier: str) -> int:
        """Return the bytes of a tier that hold something other than chunks at rest."""
        if tier == "gpu":
            return self.tail_bytes + self.loader.num_bytes
        return self._host_extra_bytes if tier == "cpu" else 0

    def peak_bytes(self, level: int) -> int:
        """Return the most bytes a tier has held at a time, chunks and all else."""
        beside = self.beside_chunks_bytes(self.tiers[level].name)
        return max(self._peaks[level], self.store.peak_bytes(level) + beside)

    def row_stats(self) -> RowStats:
        """Return how the disk was read, and how long the model stood still for it."""
        counters, rows = self.counters, self.rows
        return RowStats(
            num_lines=0 if rows is None else rows.num_lines,
            num_used_lines=0 if rows is None else rows.num_used_lines,
            line_lookups=counters.line_lookups,
            line_hits=counters.line_hits,
            late_rows=counters.late_rows,
            failed_reads=counters.failed_row_reads,
            anticipated_rows=counters.anticipated_rows,
            foreseeable_rows=counters.foreseeable_rows,
            foreseen_rows=counters.foreseen_rows,
            wait_s=counters.row_wait_s + counters.load_wait_s,
            read_s=0.0 if self.disk is None else self.disk.reading.total_s,
        )

    def settle(self) -> None:
        """Wait for what goes on between the tiers in the background, but for stores.

        Raises
        ------
        TransferTimeout
            A transfer has missed the deadline.
        """
        if self.exchange is not None:
            self.exchange.settle()
        if self.rows is not None:
            self.rows.settle()

    def acquire(self) -> None:
        """Note one more user; ``release`` of the last one closes the engine."""
        self._num_users += 1

    def reserve_tails(self, owner: int, tail_bytes: int, batch: int) -> None:
        """Set aside device memory for one owner's tails, moving chunks down if need be.

        Raises
        ------
        CapacityError
            The device cannot hold them. The owner's reservation is as before; chunks may have
            moved down.
        """
        total = self.tail_bytes - self._tails.get(owner, 0) + tail_bytes
        sizes = self._plan(total, batch)
        widens = batch > self._buffer_chunks
        self._note_peaks()
        if self._tails and (widens or total > self.tail_bytes):
            self.stream.drain()
            staging = sizes.num_buffers * sizes.buffer_chunks * self.layout.slot_bytes
            self._make_room(total, staging if widens else self.loader.num_bytes)
        if widens:
            self.loader.close()
            self._open_staging(sizes)
        self._tails[owner] = tail_bytes

    def release(self, owner: int) -> None:
        """Give back an owner's tails; the last one stops every thread and closes the tiers."""
        self._note_peaks()
        self._tails.pop(owner, None)
        self._num_users -= 1
        if self._num_users == 0:
            try:
                if self.retrieval is not None:
                    self.retrieval.close()
                self.loader.close()
                self.settle()
                if self.rows is not None:
                    self.rows.close()
            finally:
                self.store.close()
                self._pinned_writes.close()

    @property
    def buffer_chunks(self) -> int:
        """Chunks that fit in one staging buffer."""
        return self._buffer_chunks

    def _make_room(self, tail_bytes: int, staging_bytes: int) -> None:
        """Shrink the device pool to what tails and staging leave of the capacity."""
        if self.device_pool is None:
            return
        capacity = self.config.capacities["gpu"]
        slots = (capacity - tail_bytes - staging_bytes) // self.layout.slot_bytes
        if slots < 0:
            raise CapacityError(
                f"gpu capacity {capacity} bytes cannot hold {tail_bytes} bytes of growing chunks "
                f"beside {staging_bytes} bytes of staging"
            )
        if slots < self.device_pool.num_slots:
            self.store.shrink(0, slots)
        self.store.restart_peaks()

    def _note_peaks(self) -> None:
        """Remember the peaks so far, before what lies beside the chunks changes."""
        self._peaks = [self.peak_bytes(level) for level in range(len(self.tiers))]

    def _plan(self, tail_bytes: int, batch: int) -> WorkingSet:
        capacities = self.config.capacities
        return plan_working_set(
            capacities.get("gpu"),
            capacities.get("cpu") if "disk" in capacities else None,
            self.layout.slot_bytes,
            tail_bytes,
            batch,
            num_exchanges=0 if self.config.placement == FIRST else MOST_EXCHANGES,
        )

    def _open_staging(self, sizes: WorkingSet) -> None:
        self._buffer_chunks = sizes.buffer_chunks
        self.loader = StagingLoader(self.store, sizes.num_buffers, sizes.buffer_chunks, self.device)
        self.stream = ChunkStream(
            self.loader, sizes.num_buffers, self.counters, self.config.deadline_s
        )

    def _plan_rows(self, spare_bytes: int | None) -> RowMemory:
        """Return the host memory for reading rows, where they may have to come from a disk."""
        sparse = self.config.preset.sparse
        if sparse is None or sparse.index is None or "disk" not in self.config.capacities:
            return RowMemory()
        return plan_row_memory(spare_bytes, self.layout, self.config.preset.rows)

    def _open_rows(self) -> RowReader | None:
        """Return what reads rows for the preset's index, on the device that attends to them."""
        sparse = self.config.preset.sparse
        if sparse is None or sparse.index is None:
            return None
        place = torch.device("cpu") if sparse.placement == "host" else self.device
        parts = self.store, place, self._row_memory, self.config.preset.rows
        if self.pipeline is None:
            return RowReader(*parts)
        return RowReader(*parts, self.pipeline.layer_begins)

    def _open_pipeline(self) -> PipelineControl | None:
        """Return what watches reads from the disk, where single rows are read or it chooses."""
        config, is_auto = self.config, self.config.codec == AUTO
        if self.disk is None or not (
            is_auto or (config.preset.sparse and config.preset.sparse.index)
        ):
            return None
        assert config.scratch is not None
        return open_control(
            config.preset,
            self.layout,
            self.disk,
            self.counters,
            self._codecs.disk,
            config.scratch.path,
            is_auto=is_auto,
            is_shared=self.device.type == "cpu",
        )

    def _build_tiers(self, sizes: WorkingSet, tail_bytes: int) -> list[Tier]:
        layout, capacities = self.layout, self.config.capacities
        staging = sizes.num_buffers * sizes.buffer_chunks * layout.slot_bytes
        tiers: list[Tier] = []
        if "gpu" in capacities:
            pool = capacities["gpu"] - staging - tail_bytes
            tiers.append(self._memory_tier("gpu", pool, self.device))
        if "cpu" in capacities:
            if "disk" in capacities:
                buffers = sizes.num_write_buffers + BUFFERS_EACH * sizes.num_exchanges
                self._host_extra_bytes = buffers * layout.slot_bytes
            if self.device.type == "cuda":
                self._host_extra_bytes += staging  # the page-locked mirror
            self._host_extra_bytes += self._codecs.host_bytes
            spare = max(0, capacities["cpu"] - self._host_extra_bytes)
            self._row_memory = self._plan_rows(spare)
            self._host_extra_bytes += self._row_memory.num_bytes
            pool = spare - self._row_memory.num_bytes
            coded = self._codecs.open_host(pool, self._num_layers)
            tiers.append(coded or self._memory_tier("cpu", pool, torch.device("cpu")))
        else:
            self._row_memory = self._plan_rows(None)
        if "disk" in capacities:
            tiers.append(self._disk_tier())
        return tiers

    def _disk_tier(self) -> Tier:
        config = self.config
        assert config.scratch is not None
        if config.preset.near is not None:
            self.near = NearDisk(
                [scratch.path for scratch in (config.scratch, *config.more_scratch)],
                capacity_bytes=config.capacities["disk"],
                layout=self.layout,
                has_channels=config.preset.near.mode == "sparf",
                settings=config.preset.near.settings,
                deadline_s=config.deadline_s,
            )
            return self.near
        self.disk = DiskTier(
            config.scratch.path,
            capacity_bytes=config.capacities["disk"],
            layout=self.layout,
            deadline_s=config.deadline_s,
            choose_codec=self._codecs.choose,
            sealer=config.sealer,
        )
        tier = self.disk if config.faults is None else FaultyTier(self.disk, config.faults)
        return tier if config.remote_url is None else open_below(tier, config, self.layout)

    def _memory_tier(self, name: str, capacity_bytes: int, device: torch.device) -> MemoryTier:
        return MemoryTier(
            name,
            capacity_bytes=capacity_bytes,
            layout=self.layout,
            device=device,
            pinned=name == "cpu" and self.device.type == "cuda",
            num_streams=self._num_layers,
        )
