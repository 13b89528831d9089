"""``offload eval fidelity``: compare attention outputs, without running a model."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.evals.fidelity import METHODS, FidelityRow, measure
from offload.evals.heads import Head, dumped_heads, parametric_heads
from offload.evals.outputs import add_outputs, publish
from offload.evals.parametric import FLAT, MEDIUM, SHARP
from offload.evals.problem import RECALL_AT, SINK_TOKENS, WINDOW_TOKENS
from offload.evals.sheets import fidelity_figures, fidelity_sheets

_NOTES = (
    f"Every query is asked by itself. The first {SINK_TOKENS} and last {WINDOW_TOKENS} tokens are "
    "read exactly and do not count; of the others, which are indexed, as many are read as `read` "
    "says, a share of all tokens. Methods that know only blocks of tokens read whole blocks.",
    f"`recall@{RECALL_AT}`: share of the {RECALL_AT} best indexed keys that was read. `mass`: that "
    "of the softmax, sinks and window included. `mass error` and `error`: of the "
    "softmax's denominator and of the output, relative, with what the method estimates for tokens "
    "that were not read. `error` is the median, `p95` the 95th percentile over queries; where a "
    "class has several heads, the mean of theirs.",
    "`index`, `scanned`, `fetched`: bytes of the index, those of it that a search reads, and keys "
    "and values that are read, as shares of keys and values. Times are CPU time of one head.",
)
_OF_PARAMETERS = "Heads are made from parameters, in bfloat16; their temperature is their class."
_OF_DUMP = (
    f"Heads are those of a model. By the softmax's share on the {RECALL_AT} best keys a head is "
    "sharp (from 0.73), medium (from 0.45) or flat."
)


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the kind."""
    parser = kinds.add_parser(
        "fidelity",
        help="compare attention outputs, without a model",
        description="Compares attention through each index with full attention, on heads made from "
        "parameters or dumped from a model (tools/dump_qkv.py).",
    )
    source = parser.add_mutually_exclusive_group()
    text = "lengths of heads made from parameters (default: 16384)"
    source.add_argument(
        "--num-keys", type=positive_int, nargs="+", default=[16384], metavar="N", help=text
    )
    source.add_argument("--dump", type=Path, metavar="FILE", help="heads of a model instead")
    text = f"how sharply they attend (default: {FLAT:g}, flat; {MEDIUM:g}; {SHARP:g}, sharp)"
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[FLAT, MEDIUM, SHARP],
        metavar="T",
        help=text,
    )
    text = "heads per length and temperature (default: 1); of a dump at most so many (all)"
    parser.add_argument("--heads", type=positive_int, metavar="N", help=text)
    text = "per head made from parameters (default: %(default)s)"
    parser.add_argument("--queries", type=positive_int, default=32, metavar="N", help=text)
    text = f"of {', '.join(map(repr, METHODS))} (default: all)"
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="M", help=text)
    text = "shares of tokens to read besides the first and last (default: %(default)s)"
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.004, 0.008, 0.018, 0.05],
        metavar="B",
        help=text,
    )
    add_outputs(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and publish.

    Raises
    ------
    ConfigError
        There is no such method, a budget is no share, or the dump is none.
    """
    for method in args.methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    for budget in args.budgets:
        if not 0 < budget <= 1:
            raise ConfigError(f"budget {budget!r} is no share of tokens, above 0 and at most 1")
    rows = list(_rows(args))
    about = _OF_PARAMETERS if args.dump is None else _OF_DUMP
    publish(
        args,
        "Fidelity of sparse attention",
        (about, *_NOTES),
        rows,
        list(fidelity_sheets(rows)),
        fidelity_figures(rows),
    )


def _rows(args: argparse.Namespace) -> Iterator[FidelityRow]:
    with tqdm(total=0, unit="index") as bar:
        for head in _heads(args):
            bar.total += len(args.methods)
            bar.set_description(f"{head.problem.num_keys} keys, {head.name}")
            for method in args.methods:
                yield from measure(head, [method], args.budgets)
                bar.update()


def _heads(args: argparse.Namespace) -> Iterator[Head]:
    if args.dump is not None:
        return dumped_heads(args.dump, args.heads)
    return parametric_heads(
        args.num_keys, args.temperatures, args.queries, num_heads=args.heads or 1
    )
