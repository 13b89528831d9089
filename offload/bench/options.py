"""Options of the benchmarks; what the user leaves out is left to the suite or the defaults."""

import argparse
from pathlib import Path
from typing import Any, Final, get_args

from offload.bench.contenders import STOCK, expand
from offload.bench.contexts import ContextKind
from offload.bench.settings import BenchSettings
from offload.bench.shapes import DTYPES, SHAPES
from offload.cli_options import positive_int
from offload.presets import PRESETS

_DEFAULTS: Final = BenchSettings()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add everything that ``given_settings`` reads, and where results go."""
    many: dict[str, Any] = {"nargs": "+", "type": positive_int, "metavar": "N"}
    _add(parser, "--contexts", "contexts", "tokens of context", **many)
    _add(parser, "--batch", "batches", "rows of a batch", **many)
    _add(parser, "--layers", "num_layers", "layers", type=positive_int, metavar="N")
    _add(parser, "--shape", "model", "whose layers", choices=SHAPES)
    options = "POLICY, and after colons BUDGET, error=E, wait_us=T, codec=C"
    names = f"{', '.join(STOCK)}; {options}, of {', '.join(PRESETS)}; "
    text = f"{names}the others are compared with the first"
    parser.add_argument("--contenders", "--policies", nargs="+", metavar="C", help=text)
    text = "of the sparse policies that come without one: shares such as 0.01, or tokens"
    parser.add_argument("--budgets", nargs="+", default=[], metavar="B", help=text)
    text = "host memory for keys and values as shares of their bytes, the others on disk, or all"
    shares: dict[str, Any] = {"nargs": "+", "type": _share, "metavar": "S"}
    _add(parser, "--ram-share", "ram_shares", text, **shares)
    text = "with a CUDA device, its memory for them as a share"
    _add(parser, "--device-share", "device_share", text, type=float, metavar="S")
    text = "capacities instead of shares, such as gpu=1GiB cpu=2GiB disk=40GiB"
    _add(parser, "--capacity", "capacity", text, nargs="+", type=_capacity, metavar="TIER=SIZE")
    _add(parser, "--steps", "steps", "steps per round", type=positive_int, metavar="N")
    _add(parser, "--rounds", "rounds", "rounds", type=positive_int, metavar="N")
    text = "begin no further round of a cell after so many"
    _add(parser, "--seconds", "seconds", text, type=float, metavar="S")
    text = "keys and values like those of language models, or normal numbers"
    _add(parser, "--context-kind", "context_kind", text, choices=get_args(ContextKind))
    text = "of the queries of successive steps, 0 (independent) to 1"
    _add(parser, "--query-correlation", "correlation", text, type=float, metavar="R")
    _add(parser, "--dtype", "dtype", "of keys, values and weights", choices=DTYPES)
    _add(parser, "--device", "device", "of the model", metavar="DEVICE")
    text = "where the disk tier keeps its files (default: the user's cache folder)"
    parser.add_argument("--disk-path", type=Path, metavar="DIR", help=text)
    _add(parser, "--seed", "seed", "random seed", type=int, metavar="N")
    text = "threads of torch (default: its own)"
    parser.add_argument("--threads", type=positive_int, metavar="N", help=text)
    text = "folder for rows.jsonl, report.md and plots (default: benchmarks/results/bench/NAME)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=text)
    parser.add_argument("--plots", action="store_true", help="draw curves (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON")


def add_prefill(parser: argparse.ArgumentParser) -> None:
    """Add the option of benchmarks that run a model."""
    text = "let the model read a prompt instead of filling the tiers directly"
    parser.add_argument(
        "--prefill", dest="has_prefill", action="store_true", default=None, help=text
    )


def given_settings(args: argparse.Namespace, contenders: tuple[str, ...]) -> dict[str, Any]:
    """Return what the user gave, by field of ``BenchSettings``.

    Parameters
    ----------
    args : argparse.Namespace
    contenders : tuple of str
        Who takes part if the user names no one.
    """
    fields = BenchSettings.__dataclass_fields__
    found = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    if "capacity" in found:
        found["capacity"] = dict(found["capacity"])
    return found | {"contenders": expand(args.contenders or contenders, args.budgets)}


def _add(parser: argparse.ArgumentParser, flag: str, field: str, text: str, **options: Any) -> None:
    """Add an option that sets a field; None if it is not given, and its default in the help."""
    default = getattr(_DEFAULTS, field)
    if isinstance(default, tuple):
        default = " ".join("all" if value is None else str(value) for value in default)
    shown = f"{text} (default: {default})" if default not in (None, {}) else text
    parser.add_argument(flag, dest=field, help=shown, **options)


def _share(text: str) -> float | None:
    if text == "all":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share nor 'all'") from None


def _capacity(text: str) -> tuple[str, str]:
    tier, equals, size = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not TIER=SIZE")
    return tier, size
