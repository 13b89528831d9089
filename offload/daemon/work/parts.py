"""What the engine is made of, put together and taken apart."""

from dataclasses import dataclass

import torch

from offload import OffloadedCache
from offload.daemon.engine_settings import EngineSettings
from offload.daemon.served_model import ServedModel
from offload.daemon.work.admission import Admission
from offload.daemon.work.compute import Compute
from offload.daemon.work.housekeeping import Housekeeping
from offload.daemon.work.matching import Matcher
from offload.daemon.work.persistence import Persistence
from offload.daemon.work.placing import Placing
from offload.daemon.work.pressure import Pressure
from offload.daemon.work.scheduler import Scheduler
from offload.daemon.work.session_book import SessionBook
from offload.daemon.work.session_keeper import SessionKeeper
from offload.daemon.work.session_stores import SessionStores
from offload.daemon.work.tally import Tally
from offload.engine import Engine


@dataclass(slots=True)
class Parts:
    """One of each.

    Attributes
    ----------
    root : OffloadedCache
        Empty; every other cache is its fork, so the capacities are those of all sessions together.
    opener : OffloadedCache
        Holds a few tokens, so that the tiers stay open while there is no session.
    """

    root: OffloadedCache
    opener: OffloadedCache
    book: SessionBook
    stores: SessionStores
    tally: Tally
    persistence: Persistence
    scheduler: Scheduler
    housekeeping: Housekeeping
    keeper: SessionKeeper

    @property
    def engine(self) -> Engine:
        """The tiers of all sessions."""
        runtime = self.opener._core.runtime
        assert runtime is not None
        return runtime.engine

    def close(self) -> None:
        """Give everything back."""
        for branch in list(self.book.branches):
            self.book.close_branch(branch)
        self.opener.close()
        self.root.close()
        self.stores.close()


def open_parts(model: ServedModel, settings: EngineSettings, admission: Admission) -> Parts:
    """Open tiers and stores.

    Raises
    ------
    ConfigError
        A setting is impossible, or the model cannot be offloaded; says which.
    CapacityError
        The device's capacity is too small for one session.
    """
    sessions = settings.sessions
    sharing = settings.sharing
    stores = SessionStores(
        settings.data_path,
        sessions.disk_quota_bytes,
        settings.min_free_bytes,
        settings.sealer,
        None if sharing is None else sharing.secret_file,
    )
    root = _open_root(model, settings)
    try:
        opener = _open_tiers(model, root)
    except BaseException:
        root.close()
        stores.close()
        raise
    book, tally = SessionBook(), Tally()
    persistence = Persistence(model, root, book, stores, tally)
    matcher = Matcher(model, root, book, stores, persistence, only_named=sharing is not None)
    placing = Placing(sessions, book, matcher, persistence, tally)
    scheduler = Scheduler(
        admission,
        placing,
        Compute(model, settings.prefill_tokens, settings.max_piece_s, tally),
        Pressure(book, persistence, tally),
        tally,
        settings.max_running,
        settings.queue_timeout_s,
    )
    housekeeping = Housekeeping(sessions, book, persistence, tally, _token_bytes(opener))
    keeper = SessionKeeper(model, sessions, book, persistence, matcher, placing)
    return Parts(root, opener, book, stores, tally, persistence, scheduler, housekeeping, keeper)


def _open_root(model: ServedModel, settings: EngineSettings) -> OffloadedCache:
    scratch = settings.data_path / "scratch" if "disk" in settings.tiers else None
    return OffloadedCache(
        settings.tiers,
        policy=settings.policy,
        codec=settings.codec,
        capacity=settings.capacity,
        disk_path=scratch,
        encrypted=settings.sealer is not None and scratch is not None,
        chunk_tokens=settings.chunk_tokens,
        config=model.model.config,
    )


def _open_tiers(model: ServedModel, root: OffloadedCache) -> OffloadedCache:
    """Return a fork that holds a token: its keys tell the layout of all chunks."""
    opener = root.fork()
    with torch.no_grad():  # in inference mode, nobody else could write to the pools
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.model.device)
        model.model(input_ids=ids, past_key_values=opener, use_cache=True, logits_to_keep=1)
    return opener


def _token_bytes(opener: OffloadedCache) -> int:
    runtime = opener._core.runtime
    assert runtime is not None
    layout = runtime.engine.layout
    return len(runtime.layers) * layout.chunk_bytes // layout.chunk_tokens
