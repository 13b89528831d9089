"""One round of a soak: a small cache and its forks on a faulty disk, against plain tensors."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from offload.core import CacheCore
from offload.engine_config import EngineConfig
from offload.errors import ClosedError, CorruptChunk, OffloadError
from offload.exact import AttentionCall
from offload.presets import find_preset
from offload.soak_audit import Audit, disk_of
from offload.soak_oracle import PlainCache
from offload.soak_tally import Tally
from offload.tiers.faults import FaultPlan
from offload.tiers.scratch import ScratchDir
from offload.types import ChunkLayout

if TYPE_CHECKING:
    from offload.engine import Engine

_LAYOUT: Final = ChunkLayout(2, 16, 32, 32, torch.float32)
"""Whole pages: no bit of a record is padding, so every damage must be noticed."""

_CAPACITIES: Final = {
    tier: slots * _LAYOUT.slot_bytes for tier, slots in (("gpu", 24), ("cpu", 12), ("disk", 400))
}
"""Most chunks of a long cache are on the disk, and three long forks do not fit."""

_NUM_LAYERS: Final = 2
_NUM_HEADS: Final = 4
_SCALE: Final = _LAYOUT.key_dim**-0.5
_TOLERANCE: Final = 1e-4
"""Between float32 and float64; what a single wrong number would do may be less, which is why the
audit compares every copy of every chunk bit by bit."""

_MAX_TOKENS: Final = 640
_MAX_MEMBERS: Final = 3
_STEPS: Final = (1, 1, 2, 16, 33, 150)
_DEADLINE_S: Final = 0.5
_MAX_WAITS: Final = 100


@dataclass(slots=True, eq=False)
class _Member:
    """A cache, and what it must hold."""

    core: CacheCore
    plain: PlainCache


class SoakRound:
    """Drives one family of caches at random, and compares everything that they give back.

    An action gives the right result or raises an OffloadError and changes nothing. What follows an
    error is what a user would do: crop what cannot be read or does not fit, and reset a cache that
    says that it is good for nothing else.

    Parameters
    ----------
    seed : int
    faults : FaultPlan
        Its own seed counts for nothing.
    directory : Path or None
        For the disk tier; by default where caches keep theirs.
    tally : Tally
        Where the findings go.
    """

    def __init__(self, seed: int, faults: FaultPlan, directory: Path | None, tally: Tally) -> None:
        self._name = f"seed {seed}"
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._tally = tally
        self._engines: list[Engine] = []
        scratch = ScratchDir(directory)
        self.folder = scratch.path
        """Of the disk tier; gone when the round is over."""
        preset, size = find_preset("exact"), _LAYOUT.chunk_tokens
        config = EngineConfig(_CAPACITIES, preset, size, scratch, _DEADLINE_S, faults)
        core = CacheCore(config)
        core.num_layers = _NUM_LAYERS
        self._members = [_Member(core, self._draw_tokens(1, 0))]
        self._actions: dict[Callable[[_Member], None], int] = {
            self._step: 60,
            self._crop: 5,
            self._read: 6,
            self._flush: 6,
            self._fork: 8,
            self._leave: 5,
            self._reset: 1,
        }

    def run(self, num_actions: int) -> None:
        """Act so many times or until something is broken, audit, and close everything."""
        try:
            for _ in range(num_actions):
                self._act()
                if not self._is_sound():
                    return
            self._audit()
        finally:
            while self._members:
                self._attempt(self._close, self._members[0])
            for engine in self._engines:
                self._tally.faults += disk_of(engine).counts
                self._tally.num_rescued += engine.counters.rescued_chunks

    def _act(self) -> None:
        [action] = self._random.choices([*self._actions], [*self._actions.values()])
        member = self._random.choice(self._members)
        self._tally.actions[action.__name__.strip("_")] += 1
        error = self._attempt(action, member)
        if error is not None and member in self._members:
            self._attempt(lambda member: self._recover(member, error), member)

    def _attempt(self, action: Callable[[_Member], None], member: _Member) -> OffloadError | None:
        try:
            action(member)
        except OffloadError as error:
            self._tally.errors[type(error).__name__] += 1
            return error
        return None

    def _recover(self, member: _Member, error: OffloadError) -> None:
        try:
            member.core.check_open()
        except ClosedError:
            self._tally.num_reset += 1
            self._reset(member)
            return
        if isinstance(error, CorruptChunk) or self._random.random() < 0.3:
            self._crop_to(member, _whole_chunks(member.plain.num_tokens // 2))

    def _step(self, member: _Member) -> None:
        """Append to every layer and attend, as a model does."""
        num_new = min(self._random.choice(_STEPS), _MAX_TOKENS - member.plain.num_tokens)
        if num_new == 0:
            return
        new = self._draw_tokens(member.plain.batch, num_new)
        grown = member.plain.extended(new)
        self._open(member)
        for layer in range(_NUM_LAYERS):
            appended = member.core.append(layer, new.keys[layer], new.values[layer])
            shape = (new.batch, _NUM_HEADS, num_new, _LAYOUT.key_dim)
            query = torch.randn(shape, generator=self._generator)
            found = member.core.attend(layer, AttentionCall(query, _SCALE), appended)
            error = float((found - grown.attend(layer, query, _SCALE)).abs().max())
            self._tally.num_results += 1
            if not error <= _TOLERANCE:
                self._tally.wrong.append(f"{self._name}: attention of layer {layer} off by {error}")
        member.plain = grown

    def _crop(self, member: _Member) -> None:
        num_tokens = self._random.randint(0, member.plain.num_tokens)
        try:
            self._crop_to(member, num_tokens)
        except OffloadError:
            # Layers that were cropped already stay so; a whole number of chunks needs no read.
            self._crop_to(member, _whole_chunks(num_tokens))
            raise

    def _read(self, member: _Member) -> None:
        for layer in [] if member.core.runtime is None else member.core.runtime.layers:
            keys, values = member.core.read_layer(layer)
            self._tally.num_results += 1
            expected = (member.plain.keys[layer], member.plain.values[layer])
            if not (torch.equal(keys, expected[0]) and torch.equal(values, expected[1])):
                self._tally.wrong.append(f"{self._name}: layer {layer} does not read back")

    def _flush(self, member: _Member) -> None:
        """Wait for what is in flight, in both directions."""
        member.core.flush()
        if member.core.runtime is not None:
            member.core.runtime.engine.stream.drain()

    def _fork(self, member: _Member) -> None:
        if len(self._members) < _MAX_MEMBERS:
            self._members.append(_Member(member.core.fork(), member.plain))

    def _leave(self, member: _Member) -> None:
        if len(self._members) > 1:
            self._close(member)

    def _reset(self, member: _Member) -> None:
        member.plain = self._draw_tokens(self._random.randint(1, 2), 0)
        member.core.reset()

    def _close(self, member: _Member) -> None:
        self._members.remove(member)
        member.core.close()

    def _open(self, member: _Member) -> None:
        """Open the tiers if they are not; those that are made now draw other faults."""
        config = member.core.config
        assert config.faults is not None
        faults = replace(config.faults, seed=self._random.getrandbits(32))
        member.core.config = replace(config, faults=faults)
        runtime = member.core.open(_LAYOUT, member.plain.batch, torch.device("cpu"))
        if runtime.engine not in self._engines:
            self._engines.append(runtime.engine)

    def _crop_to(self, member: _Member, num_tokens: int) -> None:
        if member.core.runtime is not None:
            for layer in member.core.runtime.layers:
                member.core.runtime.crop(layer, num_tokens)
        member.plain = member.plain.cropped(num_tokens)

    def _is_sound(self) -> bool:
        """Check invariants; whether they hold."""
        try:
            for member in self._members:
                lengths = {member.core.num_tokens(layer) for layer in range(_NUM_LAYERS)}
                assert lengths == {member.plain.num_tokens}, f"lengths {lengths}"
                if member.core.runtime is not None:
                    member.core.runtime.engine.store.check_integrity()
        except AssertionError as error:
            self._tally.broken.append(f"{self._name}: {error}")
            return False
        return True

    def _audit(self) -> None:
        """Compare every copy of every chunk, and count the references to each."""
        for engine in self._engines:
            disk_of(engine).is_armed = False
        kept = next((each for each in self._members if each.core.runtime is not None), None)
        if kept is None:
            return
        self._settle(kept)
        assert kept.core.runtime is not None
        audit = Audit(kept.core.runtime.engine, self._tally, self._name)
        audit.check_chunks(
            (each.core.runtime, each.plain) for each in self._members if each.core.runtime
        )
        for member in [each for each in self._members if each is not kept]:
            self._attempt(self._close, member)
        audit.check_runtime(kept.core.runtime)

    def _settle(self, member: _Member) -> None:
        """Wait until nothing is in flight, whatever becomes of it."""
        for _ in range(_MAX_WAITS):
            if self._attempt(self._flush, member) is None:
                return
        self._tally.broken.append(f"{self._name}: transfers do not end")

    def _draw_tokens(self, batch: int, num_tokens: int) -> PlainCache:
        return PlainCache.draw(_LAYOUT, _NUM_LAYERS, batch, num_tokens, self._generator)


def _whole_chunks(num_tokens: int) -> int:
    return num_tokens // _LAYOUT.chunk_tokens * _LAYOUT.chunk_tokens
