"""Measure all contenders on one cell, in turns, so that noise hits all alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from transformers import Cache

from offload import OffloadedCache
from offload.bench.clock import synchronize, timed
from offload.bench.contenders import Entry
from offload.bench.counters import add, between, read_counts
from offload.bench.dense import DenseCache
from offload.bench.drivers import AttentionDriver, Driver
from offload.bench.limits import Bandwidths
from offload.bench.rows import Sample
from offload.bench.settings import WARM_STEPS
from offload.bench.yardstick import Yardstick
from offload.peak_memory import PeakMemory

_MAX_CHECKS: Final = 4
"""Steps of which outputs are compared, at most."""


@dataclass(slots=True)
class Subject:
    """A contender that is being measured.

    Attributes
    ----------
    entry : Entry
    cache : Cache or DenseCache
    sample : Sample
    """

    entry: Entry
    cache: Cache | DenseCache
    sample: Sample = field(default_factory=Sample)


def measure_cell(
    driver: Driver, entries: Sequence[Entry], yardstick: Yardstick, advance: Callable[[], object]
) -> tuple[list[Subject], list[Bandwidths]]:
    """Measure every contender on the cell of a driver.

    Parameters
    ----------
    driver : Driver
    entries : sequence of Entry
        Who takes part; the others are compared with the first.
    yardstick : Yardstick
    advance : callable
        Called after every step, those included that do not count.

    Returns
    -------
    subjects : list of Subject
        In the order of the contenders, with what was seen of them; their caches are closed.
    speeds : list of Bandwidths
        Of every round.

    Raises
    ------
    CapacityError
        A cache does not fit into its tiers.
    """
    with ExitStack() as stack, torch.no_grad():
        subjects = []
        for entry in entries:
            subjects.append(_prepare(entry, driver, stack))
            advance()
        speeds = _run_rounds(subjects, driver, yardstick, advance)
    return subjects, speeds


def _prepare(entry: Entry, driver: Driver, stack: ExitStack) -> Subject:
    """Open a contender, fill it, and let it make its first step."""
    settings, device = driver.settings, driver.device
    subject = Subject(entry, entry.open(settings, driver.cell, driver.config))
    if isinstance(subject.cache, OffloadedCache):
        stack.enter_context(subject.cache)
    sample = subject.sample
    with _peak_hbm(device, sample), PeakMemory() as memory:
        sample.fill_s = timed(device, lambda: _fill(subject.cache, driver))
        if isinstance(subject.cache, DenseCache) and isinstance(driver, AttentionDriver):
            subject.cache.choose_form(driver.query(0, 0))
        sample.first_s = timed(device, lambda: driver.step(subject.cache, 0))
    sample.rss_bytes = memory.growth_bytes
    return subject


def _fill(cache: Cache | DenseCache, driver: Driver) -> None:
    driver.fill(cache)
    if isinstance(cache, OffloadedCache):
        cache.flush()


def _run_rounds(
    subjects: list[Subject],
    driver: Driver,
    yardstick: Yardstick,
    advance: Callable[[], object],
) -> list[Bandwidths]:
    settings, started = driver.settings, time.perf_counter()
    speeds: list[Bandwidths] = []
    for turn in range(settings.rounds):
        speeds.append(yardstick.measure())
        number = 1 + turn * (WARM_STEPS + settings.steps)
        outputs: dict[str, Tensor] = {}
        # Nobody always has the same one before it.
        for subject in subjects[turn % len(subjects) :] + subjects[: turn % len(subjects)]:
            outputs[subject.entry.name] = _round(subject, driver, number, advance)
        if turn < _MAX_CHECKS:
            expected = driver.expected(number + WARM_STEPS + settings.steps - 1)
            _check(subjects, outputs, expected)
        if settings.seconds is not None and time.perf_counter() - started > settings.seconds:
            break
    return speeds


def _check(subjects: list[Subject], outputs: dict[str, Tensor], expected: Tensor | None) -> None:
    """Compare outputs with what was expected, or else with those of the first contender."""
    checked = subjects if expected is not None else subjects[1:]
    wanted = outputs[subjects[0].entry.name] if expected is None else expected
    for subject in checked:
        found = outputs[subject.entry.name].cpu().float()
        subject.sample.errors += relative_errors(found, wanted.cpu().float())


def _round(subject: Subject, driver: Driver, number: int, advance: Callable[[], object]) -> Tensor:
    """Let a contender make the steps of one round; return what the last one computed."""
    for warm in range(WARM_STEPS):
        driver.step(subject.cache, number + warm)
        advance()
    before = read_counts(subject.cache)
    times = []
    for step in range(driver.settings.steps):
        synchronize(driver.device)
        started = time.perf_counter()
        output = driver.step(subject.cache, number + WARM_STEPS + step)
        synchronize(driver.device)
        times.append(time.perf_counter() - started)
        advance()
    counts = read_counts(subject.cache)
    subject.sample.rounds.append(times)
    subject.sample.counts = add(subject.sample.counts, between(before, counts))
    subject.sample.index_bytes = int(counts.get("index_bytes", 0))
    # Zero, too, where nothing was streamed.
    subject.sample.prefetch_rate = counts.get("prefetch_hit_rate", 0.0) or None
    return output


def relative_errors(found: Tensor, expected: Tensor) -> list[float]:
    """Return the error of each output vector, relative to its norm."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return [float(error) for error in errors.flatten()]


@contextmanager
def _peak_hbm(device: torch.device, sample: Sample) -> Iterator[None]:
    """Note by how much the memory of a CUDA device grew at most."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield
    sample.hbm_bytes = torch.cuda.max_memory_allocated(device) - before
