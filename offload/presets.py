"""Presets: each published system as a choice of parts. A preset never has its own runtime."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from offload.errors import ConfigError
from offload.index.base import Combine, KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.clusters import ClusterIndex
from offload.index.heavy import HeavyIndex
from offload.index.mean import MeanIndex
from offload.index.projection import ProjectionIndex
from offload.index.residual import ResidualIndex
from offload.index.tree import TreeIndex
from offload.near_plan import NearPlan
from offload.near_plan import changed as changed_near
from offload.sparse.head_pattern import HeadPattern, as_streaming_heads
from offload.sparse.plan import EarlyLayers, IndexRecipe, SparsePlan
from offload.sparse.row_plan import RowPlan
from offload.sparse.segments import SegmentSizes
from offload.tiers.eviction import EvictionPolicy, KeepFirst


@dataclass(frozen=True, slots=True)
class Preset:
    """A named composition.

    Attributes
    ----------
    name : str
    eviction : callable
        Makes the eviction policy of one tier.
    sparse : SparsePlan or None
        What decoding reads; None: everything.
    rows : RowPlan
        How single rows are read, if it is not everything.
    near : NearPlan or None
        Attention to what only the disk holds happens beside it; None: what is read is fetched.
    """

    name: str
    eviction: Callable[[], EvictionPolicy]
    sparse: SparsePlan | None = None
    rows: RowPlan = field(default_factory=RowPlan)
    near: NearPlan | None = None


def _over(kind: type[KeyIndex], **options: Any) -> IndexRecipe:
    return IndexRecipe(kind, options)


_no_tail = partial(SparsePlan, has_tail=False)

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("exact", KeepFirst),
        Preset("adaptive", KeepFirst, SparsePlan(_over(ResidualIndex))),
        Preset("retroinfer", KeepFirst, SparsePlan(_over(ClusterIndex), budget=0.018)),
        Preset(
            "retrieval_attention",
            KeepFirst,
            _no_tail(
                _over(ProjectionIndex),
                budget=100,
                sink_tokens=128,
                window_tokens=512,
                sizes=SegmentSizes((131072, 32768, 8192, 2048, 512)),
                placement="host",
                kept_queries=4096,
            ),
        ),
        Preset("quest", KeepFirst, _no_tail(_over(BoundsIndex), budget=2048, dense_layers=2)),
        Preset(
            "leoam",
            KeepFirst,
            _no_tail(
                # So few tokens to a box find facts; in 8 bits it takes the room of the paper's.
                _over(TreeIndex, leaf_tokens=4, bits=8, fanout=2),
                budget=0.1,
                # Boxes are made in no time, so nearly all of a context has them.
                sizes=SegmentSizes((8192, 1024, 128)),
                early=EarlyLayers(2, _over(TreeIndex, leaf_tokens=4, bits=8), budget=0.5),
            ),
            # Whole boxes are read at once; what lies just below the cut is seldom next.
            RowPlan(reads_ahead=False),
        ),
        Preset("h2o", KeepFirst, _no_tail(_over(HeavyIndex), budget=0.2, kept_queries=256)),
        Preset("instinfer", KeepFirst, near=NearPlan()),
        Preset("rekv", KeepFirst, _no_tail(_over(MeanIndex, is_cosine=True), budget=0.05)),
        Preset(
            "infllm",
            KeepFirst,
            _no_tail(
                _over(MeanIndex, chunk_tokens=128, representatives=4),
                budget=2048,
                sink_tokens=128,
                window_tokens=4096,
            ),
        ),
        Preset("streaming", KeepFirst, _no_tail(None, budget=2048)),
    )
}


_REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError)
"""What an index makes of options that it did not expect."""


def find_preset(name: object) -> Preset:
    """Return a preset by name, or as it is; raise ConfigError naming those that exist."""
    if isinstance(name, Preset):
        return name
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(PRESETS)}")
    return preset


def customised(
    policy: str | Preset,
    *,
    budget: float | int | None = None,
    error: float | None = None,
    tail: bool | None = True,
    dense_layers: int | None = None,
    streaming_heads: HeadPattern | None = None,
    group: Combine | None = None,
    sink_tokens: int | None = None,
    window_tokens: int | None = None,
    dense_below: int | Literal["auto"] | None = None,
    max_wait_us: float | None = None,
    line_share: float | None = None,
    abstracts: Literal["ram", "disk"] | None = None,
    early_budget: float | int | None = None,
    least_disk_share: float | None = None,
    **index: Any,
) -> Preset:
    """Return a preset with some of its choices changed, for ``OffloadedCache(policy=...)``.

    Parameters
    ----------
    policy : str or Preset
    budget : float or int, optional
        A share of the context, above 0 and at most 1.0; or a positive number of tokens. Layers
        that a preset has read more by itself (the first two of ``leoam``) read no less than that.
    error : float, optional
        Read as little as keeps the relative error of nine in ten answers below this, as far as the
        self-check can tell; the budget is then the most that is read, a tenth by default. For
        ``adaptive``.
    tail : bool or None
        False or None: forget what is not read instead of estimating it.
    dense_layers : int, optional
        Layers from the first that read everything.
    streaming_heads : optional
        Heads that attend to sinks and window only: ``[num_layers][num_kv_heads]`` of bool, or a
        file as ``read_head_pattern`` reads it.
    group : {"max", "sum"}, optional
        How the query heads of a group agree on what to read: by the largest share that any of them
        gives a token, or by the sum.
    sink_tokens, window_tokens : int, optional
        First and last tokens that are always attended.
    dense_below : int or "auto", optional
        Tokens of context below which everything is read. ``"auto"``: below which that is faster in
        memory, as measured on this machine when it is first asked; so results may differ from one
        machine to the next, and from run to run.
    max_wait_us : float, optional
        Longest wait of a layer, at each step, for rows from the disk, in microseconds; what is late
        stays in the estimate. By default everything is waited for.
    line_share : float, optional
        From 0 to 1: share of the host's capacity that keeps single rows of what lies on the disk.
    abstracts : {"ram", "disk"}, optional
        Where the index lies: in memory, or in files mapped into it, for machines short of memory.
    early_budget : float or int, optional
        What the first layers read of a preset that treats them otherwise (``leoam``).
    least_disk_share : float, optional
        From 0 to 1: read from the disk only what can be hidden behind compute, as far as measured,
        but at least such a share of what is wanted.
    **index
        Options of the preset's index, such as ``leaf_tokens`` for ``leoam``; of early layers, too,
        where they have not one of their own. For ``instinfer`` those of ``NearPlan`` and
        ``NearSettings``.

    Raises
    ------
    ConfigError
        The preset reads everything, or a value is none.
    """
    preset = find_preset(policy)
    if preset.near is not None:
        options = {**index, **({} if budget is None else {"budget": _checked_budget(budget)})}
        if options:
            preset = replace(preset, near=changed_near(preset.near, options))
        budget, index = None, {}
    counts = {
        "dense_layers": dense_layers,
        "sink_tokens": sink_tokens,
        "window_tokens": window_tokens,
    }
    changes: dict[str, Any] = {name: count for name, count in counts.items() if count is not None}
    for name, count in changes.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"{name}={count!r} is no number of tokens or layers")
    if budget is not None:
        changes["budget"] = _checked_budget(budget)
    if error is not None:
        changes |= {"error": _checked_error(error), "budget": changes.get("budget", 0.1)}
    if streaming_heads is not None:
        changes["streaming_heads"] = as_streaming_heads(streaming_heads)
    if group is not None:
        if group not in ("max", "sum"):
            raise ConfigError(f"group={group!r} is neither 'max' nor 'sum'")
        changes["group"] = group
    if not tail:
        changes["has_tail"] = False
    if dense_below is not None:
        is_number = isinstance(dense_below, int) and not isinstance(dense_below, bool)
        if dense_below != "auto" and not (is_number and dense_below >= 0):
            raise ConfigError(f"dense_below={dense_below!r} is neither 'auto' nor tokens")
        changes["dense_below"] = dense_below
    if abstracts is not None:
        if abstracts not in ("ram", "disk"):
            raise ConfigError(f"abstracts={abstracts!r} is neither 'ram' nor 'disk'")
        if preset.sparse is not None and preset.sparse.index is None:
            raise ConfigError(f"policy {preset.name!r} has no index; it takes no abstracts")
        changes["abstracts"] = abstracts
    row_changes = _checked_rows(
        max_wait_us=max_wait_us, line_share=line_share, least_disk_share=least_disk_share
    )
    changes |= _changed_index(preset, index, early_budget)
    if not changes and not row_changes:
        return preset
    if preset.sparse is None:
        raise ConfigError(
            f"policy {preset.name!r} reads everything; it takes no "
            f"{' or '.join([*changes, *row_changes])}"
        )
    recipe = preset.sparse.index
    if error is not None and (recipe is None or not recipe.kind.expects_errors):
        raise ConfigError(f"policy {preset.name!r} cannot tell how far off it is; give it a budget")
    return replace(
        preset,
        sparse=replace(preset.sparse, **changes),
        rows=replace(preset.rows, **row_changes),
    )


def _checked_budget(budget: object) -> float | int:
    if (
        isinstance(budget, bool)
        or not isinstance(budget, int | float)
        or not budget > 0
        or (isinstance(budget, float) and budget > 1)
    ):
        raise ConfigError(
            f"budget={budget!r} is neither a share of the context, above 0 and at most 1.0, nor a "
            "positive number of tokens"
        )
    return budget


def _checked_error(error: object) -> float:
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1:
        raise ConfigError(f"error={error!r} is no relative error, above 0 and below 1")
    return float(error)


def _changed_index(
    preset: Preset, options: dict[str, Any], early_budget: float | int | None
) -> dict[str, Any]:
    """Return what a plan becomes with other options of its index, tried on a few keys."""
    sparse, changes = preset.sparse, dict[str, Any]()
    if sparse is None:
        return {**options, **({} if early_budget is None else {"early_budget": early_budget})}
    if options:
        if sparse.index is None:
            raise ConfigError(
                f"policy {preset.name!r} has no index; it takes no {' or '.join(options)}"
            )
        index = IndexRecipe(sparse.index.kind, {**sparse.index.options, **options})
        try:
            index.build(torch.zeros(1, 64, 32), torch.zeros(1, 64, 32), None)
        except ConfigError:
            raise
        except _REFUSALS as error:
            raise ConfigError(f"policy {preset.name!r} with {options}: {error!r}") from error
        changes["index"] = index
    if early_budget is not None:
        if sparse.early is None:
            raise ConfigError(f"policy {preset.name!r} treats no layers otherwise than others")
        changes["early"] = replace(sparse.early, budget=_checked_budget(early_budget))
    return changes


def _checked_rows(**given: object) -> dict[str, Any]:
    """Return those that are given, or raise ConfigError."""
    checked = {}
    for name, value in given.items():
        if value is None:
            continue
        most = math.inf if name == "max_wait_us" else 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ConfigError(f"{name}={value!r} is no number from 0 to {most:g}")
        checked[name] = float(value)
    return checked
