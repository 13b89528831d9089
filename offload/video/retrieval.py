"""Which frames a question is answered from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offload.errors import ConfigError

Mode = Literal["rekv", "tokmax", "recent", "uniform", "oracle", "external"]

_SHARPNESS = 4.0
"""Of the softmax over frames in ``tokmax``: means of keys are shorter than keys."""


@dataclass(frozen=True, slots=True)
class RetrievalPlan:
    """How frames are chosen.

    Attributes
    ----------
    mode : {"rekv", "tokmax", "recent", "uniform", "oracle", "external"}
        ``rekv``: the inner product of the mean query and a frame's mean key, all heads added up, as
        ReKV's code has it (arXiv 2503.00540; the paper says cosine). ``tokmax``: for each token of
        the question and head the softmax over frames of the same products, and the largest of
        these. ``oracle`` and ``external``: as told.
    num_units : int
        Units that are retrieved.
    num_recent : int
        Of the last units, always among the context; they count among ``num_units``.
    is_consensus : bool
        All layers read the same units: those with the largest mean score; needs another pass.
    choose : callable, optional
        For ``external``: returns a score for each unit, of the text of a question and the number of
        units. For ``oracle``: the same, from the truth.
    """

    mode: Mode = "tokmax"
    num_units: int = 8
    num_recent: int = 1
    is_consensus: bool = False
    choose: Callable[[str, int], Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.num_units < 1 or not 0 <= self.num_recent <= self.num_units:
            raise ConfigError(
                f"{self.num_units} units with {self.num_recent} of the last ones among them: at "
                "least one is retrieved, and the last ones count"
            )
        if self.needs_scores and self.choose is None:
            raise ConfigError(f"retrieval {self.mode!r} needs to be told what each frame is worth")

    @property
    def needs_scores(self) -> bool:
        """Whether somebody else says what units are worth."""
        return self.mode in ("oracle", "external")

    @property
    def has_own_scores(self) -> bool:
        """Whether units are compared with the question's queries."""
        return self.mode in ("rekv", "tokmax")


REKV = RetrievalPlan("rekv", 64, 0)
"""As published, the recent window left out of the context."""


def scores_of(mode: Mode, query: Tensor, means: Tensor, scale: float) -> Tensor:
    """Return what units are worth to a question, in one layer.

    Parameters
    ----------
    mode : {"rekv", "tokmax"}
    query : Tensor, shape (num_heads, num_tokens, key_dim)
        Of the question, not rotated.
    means : Tensor, shape (num_units, num_kv_heads, key_dim)
    scale : float
        Of logits.

    Returns
    -------
    Tensor, shape (num_units,)
    """
    heads = means.shape[1]
    asked = query.float().unflatten(0, (heads, -1))
    if mode == "rekv":
        # A group's queries added up, so that the keys need not be repeated for each of them.
        return torch.einsum("hd,uhd->u", asked.mean(2).sum(1), means.to(asked))
    logits = torch.einsum("hgtd,uhd->hgtu", asked, means.to(asked)) * (scale * _SHARPNESS)
    return logits.softmax(-1).flatten(0, 2).amax(0)


def coverage_of(query: Tensor, means: Tensor, scale: float, units: Sequence[int]) -> float:
    """Return the share of a question's attention to units that some of them get, by mean keys.

    An estimate from what is in memory, of one layer: the softmax over units, as if each were one
    token with its mean key, averaged over heads and the tokens of the question.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_tokens, key_dim)
        Of the question, not rotated.
    means : Tensor, shape (num_units, num_kv_heads, key_dim)
    scale : float
        Of logits.
    units : sequence of int
    """
    if not len(units):
        return 0.0
    asked = query.float().unflatten(0, (means.shape[1], -1))
    logits = torch.einsum("hgtd,uhd->hgtu", asked, means.to(asked)) * scale
    return float(logits.softmax(-1)[..., list(units)].sum(-1).mean())


def chosen(plan: RetrievalPlan, scores: Tensor | None, num_units: int) -> list[int]:
    """Return the units to read, in time order, counted from the first frame's.

    Parameters
    ----------
    plan : RetrievalPlan
    scores : Tensor or None, shape (num_units,)
        None for those that go by time alone.
    num_units : int
        Units that may be read.
    """
    count = min(plan.num_units, num_units)
    if plan.mode == "recent":
        return list(range(num_units - count, num_units))
    if plan.mode == "uniform":
        return sorted({round(i * (num_units - 1) / max(1, count - 1)) for i in range(count)})
    assert scores is not None
    recent = range(num_units - min(plan.num_recent, count), num_units)
    found = set(recent)
    for unit in torch.argsort(scores, descending=True, stable=True).tolist():
        if len(found) == count:
            break
        found.add(unit)
    return sorted(found)
