"""Run a benchmark, cell after cell."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch

from offload.bench.contenders import Entry, find_entries
from offload.bench.contexts import Context, make_context
from offload.bench.drivers import AttentionDriver, ModelDriver, make_model
from offload.bench.measure import measure_cell
from offload.bench.rows import BenchRow
from offload.bench.settings import WARM_STEPS, BenchSettings, Cell
from offload.bench.summary import make_row
from offload.bench.yardstick import Yardstick
from offload.errors import CapacityError
from offload.machine import read_memory

_WARM_TOKENS: Final = 6144
"""Enough for an index beside the largest window of a preset."""


class Benchmark:
    """One benchmark, checked and ready to run.

    Parameters
    ----------
    settings : BenchSettings
    entries : sequence of Entry, optional
        Who takes part, instead of those that the settings name.

    Raises
    ------
    ConfigError
        There is no such contender, or it cannot take part on this machine.
    """

    def __init__(self, settings: BenchSettings, entries: Sequence[Entry] | None = None) -> None:
        self.settings = settings
        self._entries = find_entries(settings) if entries is None else list(entries)

    @property
    def num_steps(self) -> int:
        """How often ``advance`` is called if no round is left out."""
        settings = self.settings
        per_entry = 1 + settings.rounds * (WARM_STEPS + settings.steps)
        return len(list(settings.cells())) * len(self._entries) * per_entry

    def run(self, advance: Callable[[], object]) -> Iterator[BenchRow]:
        """Yield one row per cell and contender.

        Raises
        ------
        CapacityError
            The contenders of a cell do not fit into memory together.
        ConfigError, StorageError
            The disk cannot be used.
        """
        settings = self.settings
        cells = list(settings.cells())
        for cell in cells:
            self._check_memory(cell)
        has_disk = any(each.uses_disk(settings, cell) for each in self._entries for cell in cells)
        model = make_model(settings) if settings.level == "decode" else None
        with Yardstick(settings.torch_device, settings.disk_path, has_disk=has_disk) as yardstick:
            self._warm_up(model, yardstick)
            for cell in cells:
                yield from self._measure(settings, cell, model, yardstick, advance)

    def _warm_up(self, model: torch.nn.Module | None, yardstick: Yardstick) -> None:
        """Let everyone make steps on a short context: kernels are compiled when first used."""
        if self.settings.has_prefill:
            return  # which would take longer than what it saves
        roomy = replace(self.settings, capacity={}, device_share=1.0, rounds=1, steps=1)
        self._measure(roomy, Cell(_WARM_TOKENS, 1, None), model, yardstick, lambda: None)

    def _check_memory(self, cell: Cell) -> None:
        """Refuse a cell whose contenders, which are open together, do not fit."""
        kv_bytes = self.settings.kv_bytes(cell)
        shares = [entry.host_share(self.settings, cell) for entry in self._entries]
        # The context is that of one layer and row, which all of them share.
        context_bytes = kv_bytes // (self.settings.num_layers * cell.batch)
        needed = int(sum(shares) * kv_bytes) + context_bytes
        available = read_memory().available_bytes
        if needed > available:
            raise CapacityError(
                f"{cell.num_tokens} tokens, batch {cell.batch}: {len(shares)} contenders and the "
                f"context take {needed} bytes of memory, and {available} are available; measure "
                "fewer of them together, or fewer layers"
            )

    def _measure(
        self,
        settings: BenchSettings,
        cell: Cell,
        model: torch.nn.Module | None,
        yardstick: Yardstick,
        advance: Callable[[], object],
    ) -> list[BenchRow]:
        # Only rows leave this function: the next cell needs the memory of the caches.
        context = _context(settings, cell)
        driver = (
            AttentionDriver(settings, cell, context)
            if model is None
            else ModelDriver(settings, cell, context, model)
        )
        subjects, speeds = measure_cell(driver, self._entries, yardstick, advance)
        return [make_row(each, subjects[0], driver, speeds) for each in subjects]


def _context(settings: BenchSettings, cell: Cell) -> Context:
    return make_context(
        settings.shape,
        cell.num_tokens,
        settings.num_steps,
        num_layers=settings.num_layers,
        batch=cell.batch,
        kind=settings.context_kind,
        correlation=settings.correlation,
        dtype=settings.torch_dtype,
        seed=settings.seed,
    )
