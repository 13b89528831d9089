"""``offload generate``: continue a prompt with any local model, its KV cache on several tiers."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from offload.cache import OffloadedCache
from offload.cli_options import (
    add_run_options,
    apply_threads,
    positive_int,
    probability,
    temperature,
)
from offload.cli_progress import token_progress
from offload.errors import ConfigError
from offload.local_model import DTYPES, RECALL, load_local_model
from offload.prefill import prefill
from offload.report import pairs_table, stats_data, stats_report
from offload.stats import CacheStats

_EXAMPLE: Final = "gpu=2GiB,cpu=8GiB"


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What one run produced; ``--json`` prints it field by field.

    Attributes
    ----------
    text : str
        What follows the prompt.
    prompt_tokens, new_tokens : int
    prefill_s : float
        For the prompt but for its last token.
    decode_s : float
        For that one and the new ones.
    stats : CacheStats
        At the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    stats: CacheStats


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("generate", help="continue a prompt with a local model")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help=f"local folder, or {RECALL!r} for the demo's"
    )
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="text to continue, UTF-8; '-' is standard input"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the same, or what follows the file")
    _add_generation_options(parser)
    parser.add_argument(
        "--tiers", default="gpu,cpu,disk", help="fastest first (default: %(default)s)"
    )
    parser.add_argument(
        "--capacity", default="", metavar="SIZES", help=f"hard limits, such as {_EXAMPLE}"
    )
    parser.add_argument("--policy", default="exact", help="what to read (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="auto", help="such as cuda:0 (default: %(default)s)")
    parser.add_argument(
        "--stats", action="store_true", help="print the cache's statistics to standard error"
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the continuation to standard output, or print it as JSON.

    Raises
    ------
    OffloadError
        The arguments are impossible, or a tier failed.
    """
    apply_threads(args)
    prompt = read_prompt(args.prompt_file, args.prompt)
    # The cache comes first: loading a model takes minutes, finding a bad argument should not.
    with OffloadedCache(
        [tier.strip() for tier in args.tiers.split(",")],
        policy=args.policy,
        capacity=parse_capacity(args.capacity),
        disk_path=args.disk_path,
        chunk_tokens=args.chunk_tokens,
    ) as cache:
        model, tokenizer = load_local_model(args.model, args.dtype, args.device)
        cache.bind(model.config)
        generation = generate(model, tokenizer, cache, prompt, args)
    if args.json:
        data = dataclasses.asdict(generation) | {"stats": stats_data(generation.stats)}
        json.dump(data, sys.stdout, indent=2)
        print()
    if args.stats:
        _print_stats(generation)
    return 0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: OffloadedCache,
    prompt: str,
    args: argparse.Namespace,
) -> Generation:
    """Continue a prompt, streaming to standard output unless JSON is wanted."""
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    num_prompt_tokens = prompt_ids.shape[1]
    if num_prompt_tokens == 0:
        raise ConfigError(f"the tokenizer makes no token of the prompt ({len(prompt)} characters)")
    started = time.perf_counter()
    with token_progress("reading the prompt", num_prompt_tokens - 1) as advance:
        prefill(model, cache, prompt_ids[:, :-1], args.prefill_chunk_size, advance)
    prefilled = time.perf_counter()
    torch.manual_seed(args.seed)
    call: Any = model.generate  # mypy does not see it on PreTrainedModel
    output = call(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        streamer=None if args.json else TextStreamer(tokenizer, True, skip_special_tokens=True),
        **sampling(args.temperature, args.top_p),
    )
    decoded = time.perf_counter()
    new_ids = output[0, num_prompt_tokens:]
    text = str(tokenizer.decode(new_ids, skip_special_tokens=True))
    prefill_s, decode_s = prefilled - started, decoded - prefilled
    return Generation(text, num_prompt_tokens, len(new_ids), prefill_s, decode_s, cache.stats())


def sampling(heat: float, top_p: float) -> dict[str, Any]:
    """Return the arguments of ``model.generate`` for a temperature; zero is greedy."""
    if heat == 0:
        # The model's own settings would be refused, or warned about, without sampling.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": heat, "top_p": top_p, "top_k": 0}


def read_prompt(file: str | None, text: str | None) -> str:
    """Return the prompt: the content of a file, then a text; either may be missing.

    Raises
    ------
    ConfigError
        Both are missing or empty, or the file cannot be read as UTF-8.
    """
    if file is None and text is None:
        raise ConfigError("no prompt; give --prompt-file, --prompt, or both")
    prompt = (_read_file(file) if file is not None else "") + (text or "")
    if not prompt.strip():
        raise ConfigError(f"the prompt is empty ({len(prompt)} characters, all of them blank)")
    return prompt


def parse_capacity(text: str) -> dict[str, int | str]:
    """Read ``"gpu=2GiB,cpu=8GiB"``; the sizes are checked by ``OffloadedCache``.

    Raises
    ------
    ConfigError
        A part is not of the form ``tier=size``, or names a tier again.
    """
    capacity: dict[str, int | str] = {}
    for part in filter(None, text.split(",")):
        tier, equals, size = (piece.strip() for piece in part.partition("="))
        if not (tier and equals and size):
            raise ConfigError(f"capacity {part!r} is not of the form tier=size, as in {_EXAMPLE}")
        if tier in capacity:
            raise ConfigError(f"capacity names tier {tier!r} twice: {text!r}")
        capacity[tier] = size
    return capacity


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("--max-new-tokens", 128, "tokens to generate at most"),
        ("--prefill-chunk-size", 1024, "tokens of the prompt per forward pass"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(name, type=positive_int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument(
        "--top-p",
        type=probability,
        default=1.0,
        metavar="P",
        help="mass to sample from (default: all)",
    )


def _read_file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise ConfigError(f"cannot read prompt file {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {name!r} is not UTF-8: {error}") from error


def _print_stats(generation: Generation) -> None:
    console = Console(stderr=True)
    prompt, new = generation.prompt_tokens, generation.new_tokens
    rows = [
        ("prompt", f"{prompt} tokens in {generation.prefill_s:.2f} s"),
        ("new", f"{new} tokens in {generation.decode_s:.2f} s"),
    ]
    console.print(pairs_table(rows), "", stats_report(generation.stats))
