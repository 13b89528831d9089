"""The acceptance matrix: architecture x attention x mode, each cell compared with DynamicCache."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import Cache, DynamicCache

from offload import CacheStats, OffloadedCache
from tests.support.generation import Outcome
from tests.support.models import ARCHITECTURES, make_model, tight_capacity
from tests.support.modes import MODES

TIERS = ("gpu", "cpu", "disk")
CHUNK_TOKENS = (4, 8, 16)

_NO_SDPA = {"gemma2", "gpt_oss"}
_SLIDING = {"mistral_sliding", "gemma2", "gemma3", "gpt_oss", "cohere2", "exaone4", "gemma4"}
_RECURRENT = {"qwen3_next", "lfm2", "falcon_h1"}
_STATEFUL = {"qwen3_next", "falcon_h1"}
_NO_EMBEDS = {"falcon_h1"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison with DynamicCache.

    Attributes
    ----------
    architecture, attention, mode : str
    chunk_tokens : int
    with_config : bool
        Whether the cache is told the model's config, or learns it.
    """

    architecture: str
    attention: str
    mode: str
    chunk_tokens: int
    with_config: bool

    def __str__(self) -> str:
        told = "-config" if self.with_config else ""
        return f"{self.architecture}-{self.attention}-{self.mode}-{self.chunk_tokens}{told}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How an outcome differs from that of DynamicCache.

    Attributes
    ----------
    same_tokens : bool
    logit_error : float
        Largest absolute difference of any logit; infinite where the shapes differ.
    """

    same_tokens: bool
    logit_error: float


def refused_by_transformers(architecture: str, attention: str, mode: str) -> bool:
    """Tell whether transformers refuses the cell with its own DynamicCache.

    Some models have no sdpa, and some take no embeddings. Layers that forget cannot take a mask as
    long as the text; recurrent layers can neither be selected by row nor, in some models, draft.
    """
    refusing = {
        "tree_mask": _SLIDING,
        "select_rows": _RECURRENT,
        "select_tuple": _RECURRENT,
        "repeat_rows": _RECURRENT,
        "prompt_lookup": _STATEFUL,
        "assisted": _STATEFUL,
        "self_assisted": _STATEFUL,
        "inputs_embeds": _NO_EMBEDS,
    }
    no_attention = attention == "sdpa" and architecture in _NO_SDPA
    return no_attention or architecture in refusing.get(mode, ())


def all_cells() -> Iterator[Cell]:
    """Yield every cell that transformers accepts, chunk sizes and configs taking turns."""
    turn = 0
    for architecture in ARCHITECTURES:
        for attention in ("sdpa", "eager"):
            for mode in MODES:
                if not refused_by_transformers(architecture, attention, mode):
                    size = CHUNK_TOKENS[turn % len(CHUNK_TOKENS)]
                    yield Cell(architecture, attention, mode, size, turn // 3 % 2 == 1)
                    turn += 1


def covering_cells() -> Iterator[Cell]:
    """Yield each architecture with two in five modes, the attention implementations taking turns.

    Every mode meets every kind of model; ``benchmarks.matrix --full`` leaves nothing out.
    """
    choices: dict[tuple[str, str], list[Cell]] = {}
    for cell in all_cells():
        choices.setdefault((cell.architecture, cell.mode), []).append(cell)
    rows, columns = list(ARCHITECTURES), list(MODES)
    for (architecture, mode), cells in choices.items():
        row, column = rows.index(architecture), columns.index(mode)
        if (row + 2 * column) % 5 < 2:
            yield cells[(row + column) % len(cells)]


@cache
def expected_outcome(architecture: str, attention: str, mode: str) -> Outcome:
    """Run a mode with DynamicCache; once per process."""
    model = make_model(architecture, attention)
    return MODES[mode](model, lambda: DynamicCache(config=model.config))


def run_offloaded(cell: Cell, disk_path: Path) -> tuple[Outcome, CacheStats]:
    """Run a cell with OffloadedCache on three tight tiers.

    Parameters
    ----------
    cell : Cell
    disk_path : Path
        Folder for the disk tier.

    Returns
    -------
    outcome : Outcome
    stats : CacheStats
        Of the cache, at the end.
    """
    model, mode = make_model(cell.architecture, cell.attention), MODES[cell.mode]
    capacity = tight_capacity(model, mode.rows, cell.chunk_tokens)
    made: list[OffloadedCache] = []

    def make_cache() -> Cache:
        offloaded = OffloadedCache(
            TIERS,
            capacity=capacity,
            disk_path=disk_path,
            chunk_tokens=cell.chunk_tokens,
            config=model.config if cell.with_config else None,
        )
        made.append(stack.enter_context(offloaded))
        return offloaded

    with ExitStack() as stack:
        outcome = mode(model, make_cache)
        made[0].check_integrity()
        return outcome, made[0].stats()


def compare(expected: Outcome, found: Outcome) -> Comparison:
    """Compare the tokens and the logits of two outcomes."""
    same = len(expected.tokens) == len(found.tokens) and all(
        torch.equal(a, b) for a, b in zip(expected.tokens, found.tokens, strict=True)
    )
    if [a.shape for a in expected.logits] != [b.shape for b in found.logits]:
        return Comparison(same, float("inf"))
    errors = [
        float((a - b).abs().max()) for a, b in zip(expected.logits, found.logits, strict=True)
    ]
    return Comparison(same, max(errors))


def used_tiers(stats: CacheStats) -> set[str]:
    """Return the tiers that chunks were stored in."""
    return {name for name, tier in stats.tiers.items() if tier.stored_bytes > 0}
