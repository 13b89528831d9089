"""What a simulated box is made of: capacities, speeds and rules; read from JSON and written."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Self

from offload.errors import ConfigError

TIERS: Final = ("device", "host", "disk", "remote")
"""Fast to slow. The last is shared by all boxes, the others are a box's own."""


@dataclass(frozen=True, slots=True)
class Box:
    """One machine: a model's rates on it, its tiers, and how its engine takes turns.

    Attributes
    ----------
    name : str
    token_bytes : int
        Keys and values of one token, all layers.
    device_bytes, host_bytes, disk_bytes, remote_bytes : int
        Capacities for keys and values; ``remote_bytes`` is the whole store's. 0: no such tier.
    bus_bytes_per_s : float
        Host memory to device.
    disk_read_bytes_per_s, disk_write_bytes_per_s, disk_latency_s : float
        One disk, that does either.
    net_bytes_per_s, remote_latency_s : float
        A box's own link, each way, and how long the store takes to begin.
    store_bytes_per_s : float
        All boxes together, each way.
    prefill_s, prefill_token_s, prefill_pair_s : float
        A piece of n tokens after c others takes ``prefill_s + prefill_token_s * n +
        prefill_pair_s * n * (c + n / 2)``.
    decode_s, decode_row_s, decode_context_s : float
        A step of b answers with t tokens of context together takes ``decode_s + decode_row_s * b +
        decode_context_s * t``.
    request_s, write_s : float
        Work of the engine for each request, and for saving what it leaves, whatever the lengths.
    piece_tokens : int
        Longest piece of a prompt.
    max_piece_s : float
        About how long a piece may take while others wait for their next token.
    min_piece_tokens, max_running : int
    idle_to_host_s, idle_to_disk_s : float or None
        Seconds unused after which blocks leave the device, and host memory; None: when others need
        the room.
    is_blocking : bool
        Nothing is computed while blocks are read and written, as in the daemon's engine; else they
        move beside computation.
    attends_on_host : bool
        Blocks on the host are attended to where they are, as on a CPU; else they are moved up.
    is_choosy : bool
        Blocks are computed again where reading them would take longer.
    """

    name: str
    token_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    bus_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    prefill_token_s: float
    decode_s: float
    remote_bytes: int = 0
    net_bytes_per_s: float = 1.25e9
    store_bytes_per_s: float = 1e12
    remote_latency_s: float = 0.03
    disk_latency_s: float = 1e-4
    prefill_s: float = 0.0
    prefill_pair_s: float = 0.0
    decode_row_s: float = 0.0
    decode_context_s: float = 0.0
    request_s: float = 0.0
    write_s: float = 0.0
    piece_tokens: int = 512
    max_piece_s: float = 0.1
    min_piece_tokens: int = 16
    max_running: int = 64
    idle_to_host_s: float | None = None
    idle_to_disk_s: float | None = None
    is_blocking: bool = False
    attends_on_host: bool = False
    is_choosy: bool = True

    def __post_init__(self) -> None:
        positive = ("token_bytes", "device_bytes", "prefill_token_s", "decode_s")
        counts = ("piece_tokens", "min_piece_tokens", "max_running")
        speeds = tuple(each.name for each in fields(self) if each.name.endswith("_per_s"))
        for name in (*positive, *counts, *speeds):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{self.name}: {name} is {getattr(self, name)}, not positive")
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, int | float) and value < 0:
                raise ConfigError(f"{self.name}: {each.name} is {value}, below 0")

    def piece_s(self, num_tokens: int, num_before: int) -> float:
        """Return how long a piece of a prompt takes after so many tokens."""
        pairs = num_tokens * (num_before + num_tokens / 2)
        return self.prefill_s + self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs

    def prompt_s(self, num_tokens: int, num_before: int = 0) -> float:
        """Return how long a prompt takes in pieces of ``piece_tokens``, with nothing beside it."""
        num_pieces = -(-num_tokens // self.piece_tokens)
        pairs = num_tokens * (num_before + num_tokens / 2)
        work_s = self.prefill_token_s * num_tokens + self.prefill_pair_s * pairs
        return self.prefill_s * num_pieces + work_s

    def step_s(self, num_rows: int, context_tokens: float) -> float:
        """Return how long one token of every answer takes."""
        rows_s = self.decode_row_s * num_rows
        return self.decode_s + rows_s + self.decode_context_s * context_tokens

    def capacity_bytes(self, tier: str) -> int:
        """Return the capacity of a tier, by its name."""
        return int(getattr(self, f"{tier}_bytes"))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], origin: str = "machine") -> Self:
        """Make a box of what ``to_json`` returned.

        Raises
        ------
        ConfigError
            A field is missing, unknown, or impossible.
        """
        unknown = set(data) - {each.name for each in fields(cls)}
        if unknown:
            raise ConfigError(f"{origin}: a box has no {', '.join(sorted(unknown))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"{origin}: not a box: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def read_box(text: str) -> Box:
    """Return a ready box by its name, or the one in a JSON file.

    Raises
    ------
    ConfigError
        It is neither, or the file is not a box.
    """
    if text in BOXES:
        return BOXES[text]
    try:
        data = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        known = ", ".join(BOXES)
        raise ConfigError(f"{text!r} is none of {known}, and no file of a box: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{text}: not a box, but a {type(data).__name__}")
    return Box.from_json(data, text)


_GIB: Final = 1 << 30

_ASSUMED_8B: Final = Box(
    name="8b",
    token_bytes=128 << 10,
    device_bytes=48 * _GIB,
    host_bytes=256 * _GIB,
    disk_bytes=4096 * _GIB,
    bus_bytes_per_s=50e9,
    disk_read_bytes_per_s=6e9,
    disk_write_bytes_per_s=3e9,
    prefill_s=2e-3,
    prefill_token_s=1 / 20_000,
    prefill_pair_s=1e-9,
    decode_s=8e-3,
    decode_row_s=2e-5,
    decode_context_s=(128 << 10) / 2.5e12,
    request_s=5e-4,
    piece_tokens=2048,
    min_piece_tokens=256,
    max_running=128,
)

BOXES: Final = {
    "8b": _ASSUMED_8B,
    "70b": replace(
        _ASSUMED_8B,
        name="70b",
        token_bytes=320 << 10,
        device_bytes=160 * _GIB,
        host_bytes=1024 * _GIB,
        disk_bytes=16384 * _GIB,
        bus_bytes_per_s=200e9,
        disk_read_bytes_per_s=24e9,
        disk_write_bytes_per_s=12e9,
        prefill_s=4e-3,
        prefill_token_s=1 / 9_000,
        prefill_pair_s=2e-9,
        decode_s=15e-3,
        decode_row_s=5e-5,
        decode_context_s=(320 << 10) / 9e12,
    ),
}
"""Assumed, not measured: round numbers of 2026 for one accelerator with an 8B-class model (GQA, 32
layers, bfloat16), and for four with a 70B-class one (GQA, 80 layers)."""
