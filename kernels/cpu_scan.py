"""The scan of ``kernels.scan`` on CPUs with compiled kernels. Needs numba."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.codes import middle, rotation
from offload.kernels.cpu_scan_heads import scan_heads
from offload.kernels.cpu_scan_query import round_queries
from offload.kernels.cpu_scan_tables import LOGS, LOGS_OF_BRAINS, Found, Query, Tables
from offload.kernels.cpu_threads import run_shares
from offload.kernels.scan import Combine, Scan, ScanTables
from offload.types import Partial

_MAX_DIM = 320
"""Sums of products of codes fit into 16 bits, and of centroids into 32."""


def supports(tables: ScanTables, query: Tensor) -> bool:
    """Whether ``scan`` here can do what ``kernels.scan`` would be asked to."""
    return query.device.type == "cpu" and query.shape[-1] <= _MAX_DIM


def scan(tables: ScanTables, query: Tensor, budget: int, group: Combine) -> Scan:
    """Scan as ``kernels.scan.scan`` does. Thread-safe: no state."""
    num_heads, num_queries, _ = query.shape
    shape, hits = (num_heads, num_queries), min(budget, tables.num_tokens)
    value_dim = tables.value_means.shape[2]
    found = Scan(
        places=torch.empty(num_heads, hits, dtype=torch.int64),
        clusters=torch.empty(num_heads, hits, dtype=torch.int64),
        logits=torch.empty(*shape, hits),
        rest=Partial(torch.empty(*shape, value_dim), torch.empty(shape)),
        squares=torch.empty(shape),
        num_scanned=0,
    )
    num_scanned = np.zeros(num_heads, np.int64)
    out = Found(
        found.places.numpy(),
        found.clusters.numpy(),
        found.logits.numpy(),
        found.rest.out.numpy(),
        found.rest.lse.numpy(),
        found.squares.numpy(),
        num_scanned,
    )
    arrays, asked = _arrays(tables), _round_query(tables, query)
    sizes = np.array(tables.sizes, np.int64)

    def kernel(share: int, num_shares: int) -> None:
        scan_heads(
            share,
            num_shares,
            arrays,
            sizes,
            tables.num_bits,
            asked,
            tables.wanted(budget),
            group == "max",
            tables.noise(),
            LOGS,
            LOGS_OF_BRAINS,
            out,
        )

    run_shares(kernel, num_heads)
    return found._replace(num_scanned=int(num_scanned.sum()))


def _arrays(tables: ScanTables) -> Tables:
    return Tables(*(_whole(getattr(tables, name)) for name in Tables._fields))


def _whole(tensor: Tensor) -> NDArray[Any]:
    """Return an array over the rows that a tensor is the beginning of; halves as their bits.

    So it is contiguous, and kernels are not compiled again for what is not.
    """
    is_half = tensor.dtype in (torch.bfloat16, torch.float16)
    if is_half:
        tensor = tensor.view(torch.int16)
    row = tensor.stride(0) // tensor.stride(1) if len(tensor) > 1 else tensor.shape[1]
    whole = tensor.as_strided((len(tensor), row, *tensor.shape[2:]), tensor.stride()).numpy()
    return whole.view(np.uint16) if is_half else whole


def _round_query(tables: ScanTables, query: Tensor) -> Query:
    """Return queries as kernels take them.

    Not with torch: after a product of matrices its threads spin for milliseconds, on the cores that
    the scan is about to use.
    """
    num_heads, num_queries, dim = query.shape
    num_rows = tables.key_bits.shape[2] * 8 // tables.num_bits
    shape = (num_heads, num_queries)
    rounded = Query(
        np.zeros((*shape, dim + -dim % 32), np.int16),
        np.empty(shape, np.float32),
        np.zeros((num_heads, num_rows, num_queries, 4), np.int8),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
        np.empty(shape, np.float32),
    )
    wide_limit = min(32767, (1 << 31) // (127 * dim) - 1)
    turn = rotation(dim).numpy()
    round_queries(query.numpy(), turn, wide_limit, middle(tables.num_bits), rounded)
    return rounded
