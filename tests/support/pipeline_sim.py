"""Layers that run through throttled tiers on a virtual clock: what the cost model is tested by."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offload.prefetch.pipeline import CodecCost, LayerWork, Links
from offload.tiers.memory import MemoryTier
from offload.tiers.throttled import SerialLink, ThrottledTier, ThrottledTransfer
from offload.tiers.virtual_clock import VirtualClock
from offload.types import ChunkLayout, SlotId
from tests.contracts.tier_contract import make_buffers, make_infos

LAYOUT = ChunkLayout(1, 8, 64, 64, torch.float32)
"""Chunks of one page."""

_NOBODY = threading.Event()


class Chunks(NamedTuple):
    """What every layer wants: how many chunks, by where and how they lie."""

    raw: int
    encoded: int
    host: int

    @property
    def on_disk(self) -> int:
        return self.raw + self.encoded

    @property
    def share(self) -> float:
        return self.encoded / self.on_disk if self.on_disk else 0.0

    def work(self, compute_s: float, layers_ahead: int) -> LayerWork:
        size = LAYOUT.slot_bytes
        return LayerWork(
            self.on_disk * size, self.host * size, self.on_disk, compute_s, layers_ahead
        )


class Span(NamedTuple):
    """From when until when a stage works on a layer."""

    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Stage:
    """Something that works on one layer after the other."""

    begin: Callable[[], Span]
    spans: list[Span]

    def is_idle(self, now_s: float) -> bool:
        return self.has_ended(len(self.spans) - 1, now_s)

    def has_begun(self, layer: int, now_s: float) -> bool:
        return layer < 0 or (layer < len(self.spans) and self.spans[layer].begin_s <= now_s)

    def has_ended(self, layer: int, now_s: float) -> bool:
        return layer < 0 or (layer < len(self.spans) and self.spans[layer].end_s <= now_s)


class PipelineSim:
    """A disk, a bus, a device and a decoder, each busy with one thing at a time.

    Between every two stages there are two buffers: a stage begins a layer when the stage before has
    ended it, and the stage after has ended the layer before the previous one. Where host and device
    are the same cores, all stages but the disk take turns, the one that is furthest on first.
    """

    def __init__(self, chunks: Chunks, work: LayerWork, links: Links, codec: CodecCost) -> None:
        self.clock = VirtualClock()
        self._work = work
        self._chunks = chunks
        self._ratio = codec.ratio
        self._is_shared = links.is_shared
        on_device = codec.decodes_on == "device"
        disk = SerialLink(links.disk_bytes_per_s, links.read_s, self.clock)
        bus = SerialLink(links.bus_bytes_per_s, 0.0, self.clock)
        # Work that takes seconds, whatever it is.
        device = bus if links.is_shared else SerialLink(1.0, 0.0, self.clock)
        decoder = bus if links.is_shared else SerialLink(1.0, 0.0, self.clock)
        decode_s = chunks.encoded * LAYOUT.slot_bytes / codec.decode_bytes_per_s
        device_s = work.compute_s + (decode_s if on_device else 0.0)
        reads = [self._reads("disk", disk, chunks.on_disk, self._stored)]
        moves = [
            self._reads("cpu", bus, chunks.on_disk, self._stored if on_device else None),
            self._reads("cpu", bus, chunks.host, None),
        ]
        stages = [
            lambda: self._transfer(reads),
            lambda: self._work_for(decoder, 0.0 if on_device else decode_s),
            lambda: self._transfer(moves),
            lambda: self._work_for(device, device_s),
        ]
        self.stages = [Stage(begin, []) for begin in stages]

    def run(self, num_layers: int) -> list[Span]:
        """Run so many layers; return when each was computed. Nothing sleeps."""
        last = self.stages[-1]
        while not last.has_ended(num_layers - 1, self.clock.now_s()):
            if not any(self._try(number, num_layers) for number in (3, 2, 1, 0)):
                self.clock.wait_until(self._next_event_s(), _NOBODY)
        return last.spans

    def _try(self, number: int, num_layers: int) -> bool:
        """Begin the next layer of a stage if it can be; return whether it could."""
        now_s, stage = self.clock.now_s(), self.stages[number]
        layer = len(stage.spans)
        busy = self.stages[1:] if self._is_shared and number > 0 else [stage]
        if layer == num_layers or not all(other.is_idle(now_s) for other in busy):
            return False
        if number == 0:
            is_there = self.stages[-1].has_begun(layer - self._work.layers_ahead, now_s)
        else:
            is_there = self.stages[number - 1].has_ended(layer, now_s)
        is_last = number == len(self.stages) - 1
        has_buffer = is_last or self.stages[number + 1].has_ended(layer - 2, now_s)
        if is_there and has_buffer:
            stage.spans.append(stage.begin())
        return is_there and has_buffer

    def _next_event_s(self) -> float:
        now_s = self.clock.now_s()
        times = (time_s for stage in self.stages for span in stage.spans for time_s in span)
        return min(time_s for time_s in times if time_s > now_s)

    def _reads(
        self,
        name: str,
        link: SerialLink,
        num_chunks: int,
        stored_bytes: Callable[[Sequence[SlotId]], int] | None,
    ) -> Callable[[], ThrottledTransfer]:
        """Return how to read all chunks of a layer from a tier of its own."""
        inner = MemoryTier(
            name,
            capacity_bytes=num_chunks * LAYOUT.slot_bytes,
            layout=LAYOUT,
            device=torch.device("cpu"),
        )
        tier = ThrottledTier(inner, link, stored_bytes)
        slots, infos = tier.allocate(num_chunks), make_infos(num_chunks)
        out = make_buffers(num_chunks, LAYOUT)

        def read() -> ThrottledTransfer:
            transfer = tier.read(slots, infos, out)
            assert isinstance(transfer, ThrottledTransfer)
            return transfer

        return read

    def _stored(self, slots: Sequence[SlotId]) -> int:
        """Return the bytes of some chunks of which the first ones are encoded."""
        encoded = min(self._chunks.encoded, len(slots))
        return round(LAYOUT.slot_bytes * (len(slots) - encoded + encoded / self._ratio))

    def _transfer(self, reads: Sequence[Callable[[], ThrottledTransfer]]) -> Span:
        begin_s = self.clock.now_s()
        return Span(begin_s, max(read().due_s for read in reads))

    def _work_for(self, who: SerialLink, seconds: float) -> Span:
        return Span(self.clock.now_s(), who.reserve(seconds * who.bytes_per_s, 0))
