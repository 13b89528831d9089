"""What codecs save and cost on this machine, tried on random rows."""

import time
from collections.abc import Callable, Iterable
from functools import cache

import torch

from offload.prefetch.pipeline import CodecCost
from offload.tiers.codec_ladder import find_codec
from offload.tiers.codecs import Unit

_NUM_UNITS = 32
_TRIALS = 3


def calibrate(names: Iterable[str], unit: Unit) -> list[CodecCost]:
    """Encode and decode some normal rows; takes milliseconds per codec, once per process.

    Keys and values of models compress better than these, which have no structure at all; the order
    of the codecs is the same.
    """
    return [_calibrated(name, unit) for name in names]


@cache
def _calibrated(name: str, unit: Unit) -> CodecCost:
    codec = find_codec(name)
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(_NUM_UNITS, *unit.shape, generator=random).to(unit.dtype)
    payloads = [memoryview(payload) for payload in codec.encode(rows, unit)]
    out = torch.empty_like(rows)
    codec.decode(payloads, unit, out)  # the first time compiles
    seconds = min(_timed(lambda: codec.decode(payloads, unit, out)) for _ in range(_TRIALS))
    error = float((out.float() - rows.float()).norm() / rows.float().norm())
    ratio = _NUM_UNITS * unit.num_bytes / sum(map(len, payloads))
    return CodecCost(name, ratio, _NUM_UNITS * unit.num_bytes / seconds, "host", error)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)
