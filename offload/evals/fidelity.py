"""How close each method comes to full attention, at equal reads."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from offload.evals.heads import Head
from offload.evals.problem import ask
from offload.index.residual import ResidualIndex
from offload.index.topk import TopKIndex
from offload.presets import PRESETS
from offload.sparse.plan import IndexRecipe

METHODS: Mapping[str, IndexRecipe] = {
    "oracle, rest estimated": IndexRecipe(TopKIndex),
    "oracle, renormalised": IndexRecipe(TopKIndex, {"renormalised": True}),
    "adaptive, 1 bit": IndexRecipe(ResidualIndex, {"num_bits": 1}),
    **{
        name: preset.sparse.index
        for name, preset in PRESETS.items()
        if preset.sparse is not None and preset.sparse.index is not None
    },
}
"""The oracle reads the tokens with the largest weights; then those of the presets that search."""


@dataclass(frozen=True, slots=True)
class FidelityRow:
    """One method at one budget on one head; means over the queries unless it says otherwise.

    Attributes
    ----------
    head : str
        What was asked.
    head_class : {"flat", "medium", "sharp"}
    num_keys : int
    method : str
    budget : float
        Tokens to read besides the first 4 and the last 64, as a share of all.
    recall : float
        Share of the 100 best keys that was read.
    mass, mass_error : float
        Share of the softmax that was read; relative error of its denominator with the estimate.
    error_median, error_p95 : float
        Of the output, relative to its length.
    bytes_per_key : float
        Of the index.
    index_share, scanned_share, fetched_share : float
        Bytes of the index, of it those that a search reads, and of keys and values that are
        fetched, as shares of keys and values.
    build_ms, search_ms : float
        CPU time to build; median CPU time to search and estimate.
    """

    head: str
    head_class: str
    num_keys: int
    method: str
    budget: float
    recall: float
    mass: float
    mass_error: float
    error_median: float
    error_p95: float
    bytes_per_key: float
    index_share: float
    scanned_share: float
    fetched_share: float
    build_ms: float
    search_ms: float


def measure(head: Head, methods: Sequence[str], budgets: Sequence[float]) -> Iterator[FidelityRow]:
    """Ask all queries of one head, by every method at every budget.

    Parameters
    ----------
    head : Head
    methods : sequence of str
        Of ``METHODS``.
    budgets : sequence of float
        Shares of all tokens.
    """
    problem = head.problem
    keys, values = problem.keys[:, problem.indexed], problem.values[:, problem.indexed]
    for method in methods:
        started = time.process_time()
        index = METHODS[method].build(keys, values, problem.train_queries)
        build_s = time.process_time() - started
        for budget in budgets:
            answers = [ask(problem, index, n, budget) for n in range(problem.num_queries)]
            errors = torch.tensor([answer.error for answer in answers])
            yield FidelityRow(
                head=head.name,
                head_class=head.head_class,
                num_keys=problem.num_keys,
                method=method,
                budget=budget,
                recall=fmean(answer.recall for answer in answers),
                mass=fmean(answer.mass for answer in answers),
                mass_error=fmean(answer.mass_error for answer in answers),
                error_median=float(errors.quantile(0.5)),
                error_p95=float(errors.quantile(0.95)),
                bytes_per_key=index.num_bytes / index.num_tokens,
                index_share=index.num_bytes / problem.kv_bytes,
                scanned_share=fmean(a.scanned_bytes for a in answers) / problem.kv_bytes,
                fetched_share=fmean(answer.read_tokens for answer in answers) / problem.num_keys,
                build_ms=1e3 * build_s,
                search_ms=median(answer.search_ms for answer in answers),
            )


def by_class(rows: Sequence[FidelityRow]) -> list[FidelityRow]:
    """Return means over heads of a class and length, for every method and budget.

    Medians and quantiles become means of those of the heads.
    """
    groups: dict[tuple[str, int, str, float], list[FidelityRow]] = {}
    for row in rows:
        groups.setdefault((row.head_class, row.num_keys, row.method, row.budget), []).append(row)
    return [_mean(group) for group in groups.values()]


_MEANS = (
    *("recall", "mass", "mass_error", "error_median", "error_p95", "bytes_per_key"),
    *("index_share", "scanned_share", "fetched_share", "build_ms", "search_ms"),
)


def _mean(rows: Sequence[FidelityRow]) -> FidelityRow:
    first = rows[0]
    means = {name: fmean(getattr(row, name) for row in rows) for name in _MEANS}
    name = first.head if len(rows) == 1 else f"{len(rows)} heads"
    return FidelityRow(
        head=name,
        head_class=first.head_class,
        num_keys=first.num_keys,
        method=first.method,
        budget=first.budget,
        **means,
    )
