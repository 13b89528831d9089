"""Accuracy of sparse policies on the recall model, the question itself processed sparsely.

One document, read exactly into one cache per policy, then questions on forks of it. The tokens of
the question and of the answer are decoded sparsely (protocol B of the literature: nothing but the
document is processed densely). Budgets are shares of the context, per query and KV head, besides
sinks, window and what is not indexed yet.

    python -m benchmarks.recall_sparse [--tokens 16384 32768] [--questions 60] [--json FILE]
        [--policies adaptive:0.004 adaptive:0.002 retroinfer:0.018]
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload import OffloadedCache
from offload.demo import Reader, choose_facts, kv_bytes, small_capacity
from offload.prefill import prefill
from offload.presets import PRESETS
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model

_PIECE_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """One policy at one length."""

    num_tokens: int
    policy: str
    budget: float | None
    num_correct: int
    num_questions: int
    share_read: float
    index_share: float
    error_median: float
    error_p95: float
    prefill_s: float
    index_s: float
    tokens_per_s: float


def measure(num_tokens: int, policy: str, budget: float | None, num_questions: int) -> Row:
    """Ask all questions with one policy."""
    model, tokenizer = load_recall_model()
    document = build_document(num_tokens, num_questions, seed=0)
    reader = Reader(model, tokenizer, document, _PIECE_TOKENS)
    facts = choose_facts(document, num_questions, seed=0)
    capacity = {**small_capacity(kv_bytes(model, num_tokens)), "disk": "8GiB"}
    with (
        tempfile.TemporaryDirectory() as folder,
        OffloadedCache(
            ["gpu", "cpu", "disk"],
            policy=policy,
            budget=budget,
            capacity=capacity,
            disk_path=folder,
        ) as cache,
    ):
        started = time.perf_counter()
        prefill(model, cache, torch.tensor([document.token_ids]), _PIECE_TOKENS, lambda n: None)
        prefill_s = time.perf_counter() - started
        first_s, second_s = (_ask(reader, cache, facts[0])[1] for _ in range(2))
        correct = answered = 0
        seconds = 0.0
        for fact in tqdm(facts, desc=f"{policy} {budget} {num_tokens}", leave=False):
            answer, elapsed = _ask(reader, cache, fact)
            correct += is_correct(fact, answer)
            answered += len(answer)
            seconds += elapsed
        stats = cache.stats()
    return Row(
        num_tokens,
        policy,
        budget,
        correct,
        len(facts),
        stats.retrieved_tokens / stats.covered_tokens if stats.covered_tokens else 1.0,
        stats.index_bytes / kv_bytes(model, num_tokens),
        stats.error_median,
        stats.error_p95,
        prefill_s,
        max(0.0, first_s - second_s),
        answered / seconds,
    )


def _ask(reader: Reader, cache: OffloadedCache, fact: object) -> tuple[list[int], float]:
    fork = cache.fork()
    started = time.perf_counter()
    answer = reader.ask(fork, fact)  # type: ignore[arg-type]
    elapsed = time.perf_counter() - started
    fork.close()
    return answer, elapsed


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(
        "tokens", "policy", "budget", "right", "read", "index", "error", "index s", "tok/s"
    )
    for row in rows:
        table.add_row(
            str(row.num_tokens),
            row.policy,
            "-" if row.budget is None else f"{row.budget:.2%}",
            f"{row.num_correct}/{row.num_questions}",
            f"{row.share_read:.2%}",
            f"{row.index_share:.1%}",
            f"{row.error_median:.3f}/{row.error_p95:.3f}",
            f"{row.index_s:.2f} of {row.prefill_s:.1f}",
            f"{row.tokens_per_s:.1f}",
        )
    Console().print(table)


def main() -> None:
    """Run the benchmark."""
    sparse = [preset for preset in PRESETS.values() if preset.sparse is not None]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["exact", "adaptive:0.004", "adaptive:0.002"]
        + [f"{preset.name}:0.018" for preset in sparse if preset.name != "adaptive"],
    )
    parser.add_argument("--json", type=Path, help="append one line per row to this file")
    options = parser.parse_args(sys.argv[1:])
    rows = []
    for num_tokens in options.tokens:
        for text in options.policies:
            policy, _, budget = text.partition(":")
            rows.append(
                measure(num_tokens, policy, float(budget) if budget else None, options.questions)
            )
            if options.json is not None:
                with options.json.open("a") as lines:
                    lines.write(json.dumps(asdict(rows[-1])) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
