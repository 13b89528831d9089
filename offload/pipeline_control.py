"""Follows what reading from the disk takes, and chooses how much of it to compress.

LeoAM (arXiv 2506.20187) compresses as much of what lies on the disk as hides its transfers behind
compute. The model is that of ``prefetch.pipeline``, and ours; what it is fed is measured here,
between one layer and the next.
"""

import math
import time
from dataclasses import replace
from typing import Any

from offload.prefetch.pipeline import LayerWork
from offload.prefetch.pipeline_plan import PipelinePlan, choose_codec, chunks_that_hide
from offload.prefetch.stage_clock import StageClock
from offload.stats import Counters
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_ladder import codec_of, find_codec
from offload.tiers.disk import DiskTier
from offload.tiers.read_meter import Fetched

_PLAN_EVERY = 64
"""Layers between two plans."""

_MEMORY = 0.1
"""Weight of the latest layer in the averages of what a layer wants."""


class PipelineControl:
    """Watches the layers of decoding steps go by.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    clock : StageClock
    disk : DiskTier
    counters : Counters
    choice : CodecChoice
        What is told how to store the chunks that come.
    is_auto : bool
        Whether it is; else stages are measured only.
    least_share : float or None
        Read from the disk no more pieces than can be hidden, but so many of those that are wanted;
        None: all of them.
    """

    def __init__(
        self,
        clock: StageClock,
        disk: DiskTier,
        counters: Counters,
        choice: CodecChoice,
        *,
        is_auto: bool,
        least_share: float | None = None,
    ) -> None:
        self._clock = clock
        self._disk = disk
        self._counters = counters
        self._choice = choice
        self._is_auto = is_auto
        self._least_share = least_share
        self._num_layers = 0
        self._work = LayerWork(0, 0, 0, 0)
        self._plan: PipelinePlan | None = None
        self._before: _Seen | None = None
        self._untimed = Fetched(0, 0)

    def stats(self) -> dict[str, Any]:
        """Return what stages take, what the model says they take, and what is stored encoded."""
        codec, share = self._choice.current
        encoded = share if codec.number else 0.0
        return {**self._clock.stats().to_dict(), "codec": codec.name, "encoded_share": encoded}

    def layer_begins(self, num_pieces: int) -> int | None:
        """Take note that a layer asks for rows now.

        Parameters
        ----------
        num_pieces : int
            Pieces on the disk that it wants, if that may be limited; else 0.

        Returns
        -------
        int or None
            How many of them to read; None: all.
        """
        seen = _Seen.now(self._disk, self._counters)
        if self._before is not None:
            self._observe(seen.since(self._before))
        self._before = seen
        self._num_layers += 1
        if self._num_layers % _PLAN_EVERY == 0:
            self._choose()
        return self._limit(num_pieces)

    def plan_for(self, work: LayerWork) -> PipelinePlan:
        """Plan for work that is expected, before any was seen, and store chunks accordingly."""
        self._work = work
        self._choose()
        assert self._plan is not None
        return self._plan

    def _observe(self, seen: "_Seen") -> None:
        compute_s = max(0.0, seen.at_s - seen.waited_s)
        self._clock.observe_compute(compute_s)
        self._observe_disk(seen)
        for number, (num_bytes, seconds) in self._disk.meter.take_decoded().items():
            name = codec_of(number).name
            if name in {codec.name for codec in self._clock.codecs()}:
                self._clock.observe_decode(name, num_bytes, seconds)
        if self._plan is not None:
            self._clock.observe_layer(self._plan.times.layer_s, seen.at_s)
        old = self._work
        self._work = replace(
            old,
            disk_bytes=old.disk_bytes + _MEMORY * (seen.wanted_bytes - old.disk_bytes),
            num_reads=old.num_reads + _MEMORY * (seen.num_reads - old.num_reads),
            compute_s=self._clock.compute_s,
        )

    def _observe_disk(self, seen: "_Seen") -> None:
        """Take note of reads; those that still go on count with their time, when they end."""
        num_bytes, num_reads = self._untimed
        read = Fetched(num_bytes + seen.disk_bytes, num_reads + seen.num_reads)
        is_timed = seen.disk_s > 0
        if is_timed and read.num_reads:
            self._clock.observe_disk(*read, seen.disk_s)
        self._untimed = Fetched(0, 0) if is_timed else read

    def _choose(self) -> None:
        links, codecs = self._clock.links(), self._clock.codecs()
        self._plan = choose_codec(self._work, links, codecs)
        if self._is_auto:
            self._choice.change(find_codec(self._plan.codec.name), self._plan.share)

    def _limit(self, num_pieces: int) -> int | None:
        if self._least_share is None or self._plan is None or not num_pieces:
            return None
        each = self._work.disk_bytes / max(1.0, self._work.num_reads)
        work = replace(self._work, disk_bytes=num_pieces * each, num_reads=num_pieces)
        hidden = chunks_that_hide(work, self._clock.links(), self._plan.codec, num_pieces)
        return max(hidden, math.ceil(self._least_share * num_pieces))


class _Seen:
    """Counters at one moment, or how much they grew."""

    def __init__(self, *numbers: float) -> None:
        self.at_s, self.waited_s, self.disk_s, *rest = numbers
        self.disk_bytes, self.num_reads, self.wanted_bytes = (int(number) for number in rest)

    @classmethod
    def now(cls, disk: DiskTier, counters: Counters) -> "_Seen":
        return cls(
            time.perf_counter(),
            counters.row_wait_s,
            disk.reading.total_s,
            *disk.meter.fetched,
            counters.loaded_bytes.get("disk", 0),
        )

    def since(self, before: "_Seen") -> "_Seen":
        mine, theirs = vars(self).values(), vars(before).values()
        return _Seen(*(a - b for a, b in zip(mine, theirs, strict=True)))
