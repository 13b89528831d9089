"""What one benchmark measures: the settings, their checks, and the cells that follow."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from offload.bench.contexts import ContextKind
from offload.bench.shapes import DTYPES, ModelShape, find_shape
from offload.errors import ConfigError

Level = Literal["attention", "decode"]

WARM_STEPS = 1
"""Steps of a round that do not count: what a contender prefetched while others had their turn, and
what they left in the processor's caches, belongs to no one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: all contenders are measured on it together.

    Attributes
    ----------
    num_tokens, batch : int
    ram_share : float or None
        Host memory for keys and values, as a share of their bytes; None: as much as they take.
    """

    num_tokens: int
    batch: int
    ram_share: float | None


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Everything that decides what is measured.

    Attributes
    ----------
    level : {"attention", "decode"}
        Layers of attention alone, or steps of a whole model.
    model : str
        Name of a shape.
    num_layers : int
    contexts, batches : tuple of int
    ram_shares : tuple of float or None
    device_share : float
        With a CUDA device: its memory for keys and values, as a share of their bytes.
    capacity : mapping of str to int or str
        Capacities of tiers, instead of what the shares give.
    contenders : tuple of str
        The first is what the others are compared with.
    steps, rounds : int
        Steps of every contender in a round, besides ``WARM_STEPS``, and rounds.
    seconds : float or None
        Begin no further round of a cell after so many.
    context_kind, correlation
        See ``make_context``.
    dtype, device : str
    has_prefill : bool
        Let the model read a prompt, instead of putting keys and values into the tiers.
    disk_path : Path or None
    seed : int

    Raises
    ------
    ConfigError
        A value is impossible.
    """

    level: Level = "attention"
    model: str = "llama-3.1-8b"
    num_layers: int = 1
    contexts: tuple[int, ...] = (8192, 32768)
    batches: tuple[int, ...] = (1,)
    ram_shares: tuple[float | None, ...] = (None,)
    device_share: float = 0.1
    capacity: Mapping[str, int | str] = field(default_factory=dict)
    contenders: tuple[str, ...] = ("dense", "exact", "adaptive")
    steps: int = 8
    rounds: int = 5
    seconds: float | None = None
    context_kind: ContextKind = "parametric"
    correlation: float = 0.9
    dtype: str = "bfloat16"
    device: str = "auto"
    has_prefill: bool = False
    disk_path: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        find_shape(self.model)
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if not 0 <= self.correlation <= 1:
            raise ConfigError(f"query correlation {self.correlation!r} is not from 0 to 1")
        for share in (*self.ram_shares, self.device_share):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"share {share!r} is not above 0 and at most 1")
        if self.has_prefill and self.level == "attention":
            raise ConfigError("prefill needs a model: it is for 'decode'")
        if len(set(self.contenders)) < len(self.contenders):
            raise ConfigError(f"a contender appears twice in {list(self.contenders)}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {self.device!r}: torch {torch.__version__} sees no CUDA")

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return find_shape(self.model)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of keys and values."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """Where the model would be."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def num_steps(self) -> int:
        """Steps of each contender on one cell: the first, and those of every round."""
        return 1 + self.rounds * (WARM_STEPS + self.steps)

    def cells(self) -> Iterator[Cell]:
        """Yield every combination of length, batch and share."""
        for combination in product(self.contexts, self.batches, self.ram_shares):
            yield Cell(*combination)

    def kv_bytes(self, cell: Cell) -> int:
        """Return the bytes of keys and values at the end of a cell."""
        per_token = self.shape.token_bytes(self.torch_dtype)
        return self.num_layers * cell.batch * (cell.num_tokens + self.num_steps) * per_token
