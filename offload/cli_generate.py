"""``offload generate``: continue a prompt with any local model, its KV cache on several tiers."""

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO, cast

from rich.console import Console

from offload.cache import OffloadedCache
from offload.cli_options import (
    add_run_options,
    apply_threads,
    budget,
    positive_int,
    probability,
    temperature,
)
from offload.cli_resume import TextSession
from offload.cli_text import Generation, generate, tokenize
from offload.errors import ConfigError
from offload.local_model import DTYPES, RECALL, load_local_model
from offload.presets import PRESETS
from offload.report import pairs_table, stats_data, stats_report
from offload.sessions.store import SessionStore

_EXAMPLE: Final = "gpu=2GiB,cpu=8GiB"


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
    text = f"what to read: {', '.join(PRESETS)} (default: %(default)s)"
    parser.add_argument("--policy", default="exact", help=text)
    text = "most that a sparse policy reads: tokens, or a share of the context such as 0.01"
    parser.add_argument("--budget", type=budget, metavar="N", help=text)
    text = "relative error that 'adaptive' may make, such as 0.05; reads no more than that takes"
    parser.add_argument("--error", type=float, metavar="E", help=text)
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    parser.add_argument("--device", default="auto", help="such as cuda:0 (default: %(default)s)")
    parser.add_argument(
        "--stats", action="store_true", help="print the cache's statistics to standard error"
    )
    _add_session_options(parser)
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Stream the continuation to standard output, or print it as JSON.

    A reader that leaves early, as ``head`` does, misses the rest; the session does not.

    Raises
    ------
    OffloadError
        The arguments are impossible, or a tier failed.
    """
    apply_threads(args)
    prompt = read_prompt(args.prompt_file, args.prompt)
    tiers = [tier.strip() for tier in args.tiers.split(",")]
    settings: dict[str, Any] = {
        "tiers": tiers,
        "policy": args.policy,
        "budget": args.budget,
        "error": args.error,
        "capacity": parse_capacity(args.capacity),
        "disk_path": args.disk_path,
    }
    with ExitStack() as stack:
        stack.enter_context(_patient_output())
        session = find_session(args.session, args.root, tiers, stack)
        # The cache comes first: loading a model takes minutes, finding a bad argument should not.
        cache = stack.enter_context(OffloadedCache(**settings, chunk_tokens=args.chunk_tokens))
        model, tokenizer = load_local_model(args.model, args.dtype, args.device)
        if session is not None and not session.is_new:
            cache.close()
            cache = stack.enter_context(session.load(model, settings))
        cache.bind(model.config)
        ids = tokenize(tokenizer, prompt, cache.token_ids).to(model.device)
        if session is not None and session.is_new:
            session.reuse(cache, model, ids)
        generation, ids = generate(model, tokenizer, cache, ids, args)
        if args.json:
            data = dataclasses.asdict(generation) | {"stats": stats_data(generation.stats)}
            json.dump(data, sys.stdout, indent=2)
            print()
        if args.stats:
            _print_stats(generation)
        # Last, so that a full disk does not take the text as well.
        if session is not None:
            session.save(cache, model, ids)
    return 0


def find_session(
    name: str | None, root: Path | None, tiers: Sequence[str], stack: ExitStack
) -> TextSession | None:
    """Return the session to go on with, new or not; its store is closed with the stack."""
    if name is None:
        if root is not None:
            raise ConfigError(f"--root {root} is where sessions are; name one with --session")
        return None
    if "disk" not in tiers:
        raise ConfigError(f"a session is read from disk; add 'disk' to --tiers {','.join(tiers)}")
    return TextSession(stack.enter_context(SessionStore(root)), name)


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


def _add_session_options(parser: argparse.ArgumentParser) -> None:
    text = "go on with the text of a session if there is one, and save it at the end"
    parser.add_argument("--session", metavar="NAME", help=text)
    text = "the session store (default: 'sessions' in the user's cache folder)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=text)


def _read_file(name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode()
    except OSError as error:
        raise ConfigError(f"cannot read prompt file {name!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt file {name!r} is not UTF-8: {error}") from error


class _PatientOutput(io.TextIOBase):
    """Standard output until its reader leaves, nothing after that."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._pass_on(partial(self._stream.write, text))
        return len(text)

    def flush(self) -> None:
        self._pass_on(self._stream.flush)

    def _pass_on(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BrokenPipeError:
            # The stream has kept what it could not write, and tries again at exit.
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def _patient_output() -> Iterator[None]:
    output = _PatientOutput(sys.stdout)
    with redirect_stdout(cast("TextIO", output)):
        try:
            yield
        finally:
            output.flush()


def _print_stats(generation: Generation) -> None:
    console = Console(stderr=True)
    prompt = generation.prompt_tokens - generation.resumed_tokens
    new = generation.new_tokens
    rows = [
        ("resumed", f"{generation.resumed_tokens} tokens"),
        ("prompt", f"{prompt} tokens in {generation.prefill_s:.2f} s"),
        ("new", f"{new} tokens in {generation.decode_s:.2f} s"),
    ]
    console.print(pairs_table(rows), "", stats_report(generation.stats))
