"""Every codec on keys and values in bfloat16: how small, how fast, how far off.

Two sources: all layers of the recall model over a document of records and questions about it, and
parametric heads of three temperatures. Units have 64 tokens of a KV head, eight are encoded at a
time, on one thread. A rate is in bytes before encoding over the median time. Errors are relative:
of all keys, of all values, and for each query, with every key and value decoded, of the output of
its attention. `int8-` is `int8` without zstd.

    python -m benchmarks.codecs [--tokens N] [--queries N] [--seeds N] [--repeats N] [--json FILE]
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from offload.bench.provenance import read_provenance
from offload.evals.parametric import FLAT, MEDIUM, SHARP, Shape, make_head
from offload.local_model import RECALL, load_local_model
from offload.tiers.codec_int8 import Int8Codec
from offload.tiers.codec_ladder import CODECS
from offload.tiers.codecs import Codec, Unit
from tools.dump_qkv import dump, read_tokens

_UNIT_TOKENS, _BATCH_UNITS = 64, 8
_TIMED_UNITS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Rows of a KV head, bfloat16 ``[num_tokens, row_dim]``, and scaled queries, float32."""

    rows: Tensor
    key_dim: int
    queries: Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One codec on the heads of one source."""

    source: str
    codec: str
    ratio: float
    encode_gb_s: float
    decode_gb_s: float
    key_error: float
    value_error: float
    output_error_median: float
    output_error_p95: float


def recall_heads(num_tokens: int, num_queries: int) -> Iterator[Head]:
    """Yield the KV heads of the recall model, with the queries of their groups."""
    model, tokenizer = load_local_model(RECALL, "float32", "cpu")
    found = dump(model, read_tokens(tokenizer, None, num_tokens, num_queries), num_queries, 1)
    for layer, kept in sorted(found.kept.items()):
        queries = kept["queries"].float() * found.scales[layer]
        groups = queries.unflatten(0, (len(kept["keys"]), -1)).flatten(1, 2)
        for keys, values, asked in zip(kept["keys"], kept["values"], groups, strict=True):
            yield Head(torch.cat([keys, values], 1).bfloat16(), keys.shape[1], asked)


def parametric_heads(num_tokens: int, num_queries: int, num_seeds: int) -> Iterator[Head]:
    """Yield heads of every temperature."""
    for temperature in (FLAT, MEDIUM, SHARP):
        for seed in range(num_seeds):
            shape = Shape(num_tokens, num_queries=num_queries, temperature=temperature, seed=seed)
            head = make_head(shape)
            rows = torch.cat([head.keys, head.values], 1).bfloat16()
            yield Head(rows, shape.head_dim, head.queries * shape.head_dim**-0.5)


def measure(source: str, name: str, codec: Codec, heads: Sequence[Head], repeats: int) -> Row:
    """Encode and decode all heads, and time some of their units."""
    errors: list[Tensor] = []
    lost, whole = torch.zeros(2), torch.zeros(2)
    raw_bytes = coded_bytes = 0
    for head in heads:
        unit, rows = _units(head)
        payloads = codec.encode(rows, unit)
        decoded = torch.empty_like(rows)
        codec.decode([memoryview(own) for own in payloads], unit, decoded)
        raw_bytes, coded_bytes = raw_bytes + rows.nbytes, coded_bytes + sum(map(len, payloads))
        sides = (head.key_dim, unit.value_dim)
        before, after = (part.float().flatten(0, 1).split(sides, 1) for part in (rows, decoded))
        lost += torch.stack([(b - a).square().sum() for a, b in zip(before, after, strict=True)])
        whole += torch.stack([part.square().sum() for part in before])
        outputs = [_attend(head.queries, *part) for part in (before, after)]
        errors.append((outputs[1] - outputs[0]).norm(dim=1) / outputs[0].norm(dim=1))
    off = torch.cat(errors)
    key_error, value_error = (lost / whole).sqrt().tolist()
    encode_s, decode_s, timed_bytes = _time(codec, heads, repeats)
    return Row(
        source,
        name,
        raw_bytes / coded_bytes,
        timed_bytes / encode_s / 1e9,
        timed_bytes / decode_s / 1e9,
        key_error,
        value_error,
        off.median().item(),
        off.quantile(0.95).item(),
    )


def _units(head: Head) -> tuple[Unit, Tensor]:
    unit = Unit(_UNIT_TOKENS, head.key_dim, head.rows.shape[1] - head.key_dim, head.rows.dtype)
    return unit, head.rows.unflatten(0, (-1, _UNIT_TOKENS))


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.mT).softmax(-1) @ values


def _time(codec: Codec, heads: Sequence[Head], repeats: int) -> tuple[float, float, int]:
    """Return the seconds that some units of all heads take, and their bytes."""
    unit, _ = _units(heads[0])
    rows = torch.cat([_units(head)[1][: _TIMED_UNITS // len(heads)] for head in heads])
    batches = rows.split(_BATCH_UNITS)
    coded = [[memoryview(own) for own in codec.encode(batch, unit)] for batch in batches]
    out = torch.empty_like(batches[0])

    def encode() -> None:
        for batch in batches:
            codec.encode(batch, unit)

    def decode() -> None:
        for payloads in coded:
            codec.decode(payloads, unit, out[: len(payloads)])

    return _median_s(encode, repeats), _median_s(decode, repeats), rows.nbytes


def _median_s(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return statistics.median(times[1:])


def show(rows: Sequence[Row]) -> None:
    """Print a table for each source."""
    console = Console(width=100)
    for source in dict.fromkeys(row.source for row in rows):
        table = Table()
        names = ("codec", "ratio", "encode", "decode GB/s", "keys", "values", "output", "p95")
        for number, name in enumerate(names):
            table.add_column(name, justify="right" if number else "left")
        for row in rows:
            if row.source == source:
                rates = (f"{rate:.2f}" for rate in (row.ratio, row.encode_gb_s, row.decode_gb_s))
                errors = (row.key_error, row.value_error, row.output_error_median)
                shown = (f"{error:.4f}" for error in (*errors, row.output_error_p95))
                table.add_row(row.codec, *rates, *shown)
        console.print(f"\n{source}", table, sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="a multiple of 64")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4, help="parametric heads per temperature")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(given)
    if args.tokens < _UNIT_TOKENS or args.tokens % _UNIT_TOKENS:
        parser.error(f"--tokens {args.tokens} is no multiple of {_UNIT_TOKENS}")
    torch.set_num_threads(1)
    sources: dict[str, Callable[[], Iterator[Head]]] = {
        "recall model": partial(recall_heads, args.tokens, args.queries),
        "parametric heads": partial(parametric_heads, args.tokens, args.queries, args.seeds),
    }
    codecs = {**CODECS, "int8-": Int8Codec(is_packing=False)}
    about, rows = read_provenance(), []
    for source, make in sources.items():
        heads = list(make())
        for name, codec in tqdm(codecs.items(), desc=source, leave=False):
            rows.append(measure(source, name, codec, heads, args.repeats))
    print(shlex.join(["python", "-m", "benchmarks.codecs", *given]))
    load = f"load average at the start {about.load_average:.2f}"
    print(f"{about.date[:10]}, {about.processor}, one thread of {about.num_cores} cores, {load}")
    show(rows)
    if args.json is not None:
        found = {"provenance": asdict(about), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
