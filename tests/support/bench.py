"""Small benchmarks."""

from typing import Any

from offload.bench.limits import Bandwidths
from offload.bench.rows import BenchRow
from offload.bench.settings import BenchSettings


def make_settings(**changes: Any) -> BenchSettings:
    """Return settings of a benchmark that takes less than a second."""
    small: dict[str, Any] = {
        "model": "tiny",
        "contexts": (512,),
        "num_layers": 2,
        "contenders": ("dense", "exact"),
        "steps": 2,
        "rounds": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    return BenchSettings(**{**small, **changes})


def make_row(**changes: Any) -> BenchRow:
    """Return a row in which nothing optional is known."""
    values: dict[str, Any] = {
        "level": "attention",
        "model": "tiny",
        "contender": "dense",
        "num_layers": 1,
        "num_tokens": 512,
        "batch": 1,
        "num_steps": 4,
        "num_rounds": 2,
        "ram_share": None,
        "kv_bytes": 1 << 20,
        "tokens_per_s": 100.0,
        "ms_median": 10.0,
        "ms_p95": 12.0,
        "first_ms": 20.0,
        "fill_s": 0.5,
        "ratio": 1.0,
        "ratio_low": 0.9,
        "ratio_high": 1.1,
        "rss_bytes": 1 << 20,
        "index_bytes": 0,
        "bandwidths": Bandwidths(1e10),
        "query_cosine": 0.9,
        "note": "",
    }
    fields = BenchRow.__dataclass_fields__
    return BenchRow(**{**dict.fromkeys(fields), **values, **changes})
