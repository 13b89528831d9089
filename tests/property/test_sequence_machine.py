"""Any life of a cache's rows (append, crop, select, fork) on three tiers, against plain tensors."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from offload.engine import Engine
from offload.engine_config import EngineConfig
from offload.errors import CapacityError
from offload.exact import AttentionCall
from offload.presets import Preset
from offload.runtime import Runtime
from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.tiers.scratch import ScratchDir
from offload.types import ChunkLayout

LAYOUT = ChunkLayout(2, 4, 8, 8, torch.float32)
NUM_LAYERS = 2
GROUP = 2
SCALE = 0.4
MAX_ROWS = 4
MAX_TOKENS = 100
TOLERANCE = 1e-5


@dataclass(slots=True)
class Plain:
    """What a runtime must hold: keys and values of every layer, ``[batch, heads, tokens, dim]``."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[2]

    def copy(self) -> "Plain":
        return Plain(list(self.keys), list(self.values))


def dense(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Attend in float64; return ``[batch, queries, heads, dim]``."""
    keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (keys, values))
    scores = query.double() @ keys.transpose(-1, -2) * SCALE
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ values).transpose(1, 2)


def hidden_keys(plain: Plain, num_queries: int, window: int | None, padding: Tensor) -> Tensor:
    """Return ``[batch, 1, queries, tokens]``, True where a query must not look."""
    query = torch.arange(plain.num_tokens - num_queries, plain.num_tokens)[:, None]
    key = torch.arange(plain.num_tokens)
    hidden = key > query
    if window is not None:
        hidden = hidden | (key <= query - window)
    return hidden | ~padding[:, None, None, :]


class SequenceMachine(RuleBasedStateMachine):
    """Runtimes that share an engine, each next to the plain tensors that it must equal."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Runtime, Plain]] = []
        self.random = torch.Generator().manual_seed(0)
        self.folder = tempfile.TemporaryDirectory(prefix="sequence-machine-")
        self.scratch = ScratchDir(Path(self.folder.name))

    @initialize(
        policy=st.sampled_from([KeepFirst, LeastRecentlyUsed]),
        batch=st.integers(1, 2),
        device_slots=st.integers(12, 40),
        num_tokens=st.integers(1, 40),
    )
    def open(
        self, policy: type[EvictionPolicy], batch: int, device_slots: int, num_tokens: int
    ) -> None:
        sizes = {"gpu": device_slots, "cpu": 8, "disk": 4096}
        capacities = {name: slots * LAYOUT.slot_bytes for name, slots in sizes.items()}
        config = EngineConfig(capacities, Preset("test", policy), LAYOUT.chunk_tokens, self.scratch)
        engine = Engine(config, LAYOUT, batch, NUM_LAYERS, torch.device("cpu"))
        empty = [torch.zeros(batch, 2, 0, 8) for _ in range(NUM_LAYERS)]
        self.pairs.append((Runtime(engine, NUM_LAYERS, batch), Plain(list(empty), list(empty))))
        self.grow(self.pairs[0], num_tokens, None, padded=False)

    def draw_pair(self, data: st.DataObject) -> tuple[Runtime, Plain]:
        return self.pairs[data.draw(st.integers(0, len(self.pairs) - 1))]

    def draw_tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    @rule(
        data=st.data(),
        num_new=st.sampled_from([1, 1, 2, 3, 4, 5, 8, 9, 13]),
        window=st.one_of(st.none(), st.integers(1, 30)),
        padded=st.booleans(),
    )
    def append_and_attend(
        self, data: st.DataObject, num_new: int, window: int | None, *, padded: bool
    ) -> None:
        self.grow(self.draw_pair(data), num_new, window, padded=padded)

    def grow(
        self, pair: tuple[Runtime, Plain], num_new: int, window: int | None, *, padded: bool
    ) -> None:
        """Append and attend in every layer, unless the rows are long enough."""
        runtime, plain = pair
        if plain.num_tokens + num_new > MAX_TOKENS:
            return
        for layer in range(NUM_LAYERS):
            keys, values = (self.draw_tensor(plain.batch, 2, num_new, 8) for _ in range(2))
            plain.keys[layer] = torch.cat([plain.keys[layer], keys], 2)
            plain.values[layer] = torch.cat([plain.values[layer], values], 2)
            appended = runtime.append(layer, keys, values)
            query = self.draw_tensor(plain.batch, 2 * GROUP, num_new, 8)
            num_tokens = plain.keys[layer].shape[2]
            padding = torch.ones(plain.batch, num_tokens, dtype=torch.bool)
            padding[0, : num_tokens // 2] = not padded
            call = AttentionCall(query, SCALE, padding if padded else None, window=window)
            found = runtime.attend(layer, call, appended)
            one_layer = Plain([plain.keys[layer]], [plain.values[layer]])
            hidden = hidden_keys(one_layer, num_new, window, padding)
            expected = dense(query, plain.keys[layer], plain.values[layer], hidden)
            assert (found - expected).abs().max() <= TOLERANCE

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        runtime, plain = self.draw_pair(data)
        if not plain.num_tokens:
            return
        length = data.draw(st.integers(0, plain.num_tokens))
        for layer in range(NUM_LAYERS):
            runtime.crop(layer, length)
            plain.keys[layer] = plain.keys[layer][:, :, :length]
            plain.values[layer] = plain.values[layer][:, :, :length]

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        runtime, plain = self.draw_pair(data)
        if not plain.num_tokens:
            return
        row = st.integers(0, plain.batch - 1)
        num_rows = data.draw(st.integers(1, MAX_ROWS))
        indices = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
        for layer in range(NUM_LAYERS):
            try:
                runtime.select(layer, indices)
            except CapacityError:
                assert layer == 0, "the first layer found room for all"
                assert len(indices) > plain.batch
                return
            plain.keys[layer] = plain.keys[layer][indices]
            plain.values[layer] = plain.values[layer][indices]

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        runtime, plain = self.draw_pair(data)
        try:
            self.pairs.append((runtime.fork(), plain.copy()))
        except CapacityError as error:
            assert "gpu capacity" in str(error)  # noqa: PT017 - most forks succeed

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        runtime, _ = self.pairs.pop(data.draw(st.integers(0, len(self.pairs) - 1)))
        runtime.close()

    @rule()
    def read_everything(self) -> None:
        for runtime, plain in self.pairs:
            for layer in runtime.layers:
                keys, values = runtime.read_layer(layer)
                assert torch.equal(keys, plain.keys[layer])
                assert torch.equal(values, plain.values[layer])

    @invariant()
    def runtimes_are_sound(self) -> None:
        for runtime, plain in self.pairs:
            for sequence in runtime.layers.values():
                assert sequence.num_tokens == plain.num_tokens
            runtime.engine.store.check_integrity()
            for tier in runtime.stats().tiers.values():
                assert tier.used_bytes <= tier.peak_bytes <= tier.capacity_bytes
        if len(self.pairs) == 1:
            self.pairs[0][0].check_integrity()

    def teardown(self) -> None:
        self.read_everything()
        for runtime, _ in self.pairs:
            runtime.close()
        self.scratch.close()
        self.folder.cleanup()


TestSequence = SequenceMachine.TestCase
TestSequence.settings = settings(stateful_step_count=30)
