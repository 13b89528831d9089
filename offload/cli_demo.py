"""``offload demo``: questions about a long document, on a cache that lives mostly on the disk."""

import argparse
import json
import sys
from typing import Final

from rich.console import Console
from transformers import DynamicCache

from offload import demo
from offload.cache import OffloadedCache
from offload.cli_options import add_run_options, apply_threads, positive_int
from offload.cli_progress import token_progress
from offload.demo_report import SLACK_BYTES, DemoReport, print_report, report_data
from offload.peak_memory import PeakMemory
from offload.recall_data import build_document
from offload.recall_model import load_recall_model

_TIERS: Final = ("gpu", "cpu", "disk")
_DESCRIPTION: Final = """Hides facts in a long document, reads it into a cache on three tiers, of
which two are too small for it, and asks for the facts; then does the same with DynamicCache.
Exits with 0 if all answers are right and all tokens identical, else with 1."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "demo", help="answer questions about a document that does not fit", description=_DESCRIPTION
    )
    for name, default, text in (
        ("--tokens", 32768, "length of the document"),
        ("--facts", 12, "facts hidden in it"),
        ("--questions", 6, "facts to ask for"),
        ("--prefill-chunk", 1024, "tokens per forward pass while reading"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(name, type=positive_int, default=default, metavar="N", help=text)
    for tier, share in (
        ("gpu", "a tenth of the document's KV cache"),
        ("cpu", "15 %% of it"),
        ("disk", "half of what is free"),
    ):
        text = f"such as 16MiB (default: {share})"
        parser.add_argument(f"--capacity-{tier}", metavar="SIZE", help=text)
    parser.add_argument("--no-baseline", action="store_true", help="leave DynamicCache out")
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its report.

    Returns
    -------
    int
        0 if all answers are right and, unless the baseline was left out, all tokens identical.

    Raises
    ------
    OffloadError
        The arguments are impossible, or a tier failed.
    """
    apply_threads(args)
    report = measure(args)
    if args.json:
        json.dump(report_data(report), sys.stdout, indent=2)
        print()
    else:
        print_report(report, Console())
    return 0 if report.has_passed else 1


def measure(args: argparse.Namespace) -> DemoReport:
    """Ask the questions on an offloaded cache and, if wanted, on ``DynamicCache``."""
    document = build_document(args.tokens, args.facts, args.seed)
    facts = demo.choose_facts(document, args.questions, args.seed)
    with PeakMemory() as memory:
        model, tokenizer = load_recall_model()
        reader = demo.Reader(model, tokenizer, document, args.prefill_chunk)
        kv_bytes = demo.kv_bytes(model, args.tokens)
        cache = OffloadedCache(
            _TIERS,
            capacity=demo.small_capacity(kv_bytes) | _given_capacity(args),
            disk_path=args.disk_path,
            chunk_tokens=args.chunk_tokens,
            config=model.config,
        )
        with cache, token_progress("OffloadedCache", args.tokens) as advance:
            offloaded = reader.run(cache, facts, advance)
            stats = cache.stats()
    baseline = None
    if not args.no_baseline:
        with token_progress("DynamicCache  ", args.tokens) as advance:
            baseline = reader.run(DynamicCache(config=model.config), facts, advance)
    allowed = sum(stats.tiers[tier].capacity_bytes for tier in ("gpu", "cpu"))
    allowed += int(model.get_memory_footprint()) + SLACK_BYTES
    return DemoReport(offloaded, baseline, stats, kv_bytes, memory.growth_bytes, allowed)


def _given_capacity(args: argparse.Namespace) -> dict[str, int | str]:
    sizes = {tier: getattr(args, f"capacity_{tier}") for tier in _TIERS}
    return {tier: size for tier, size in sizes.items() if size is not None}
