"""Choose the fastest kernel that gives the reference answer on the tensors at hand.

Compiled kernels are imported when they are first asked for: their compilers are optional.
"""

import functools
import importlib
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels import cpu, reference, rows
from offload.kernels.kept_code import remove_stale
from offload.kernels.scan import Combine, Scan, ScanTables
from offload.kernels.scan import scan as reference_scan
from offload.types import Partial


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    offset: int | None = None,
    window: int | None = None,
) -> Partial:
    """Attend with all queries over a part of the keys; see ``kernels.reference`` for the contract.

    Thread-safe: no state.
    """
    num_keys = keys.shape[1] * keys.shape[3]
    if offset is not None:
        # The whole part lies before the first query, and inside the last one's window.
        if offset >= num_keys - 1 and (window is None or query.shape[2] - 1 + offset < window):
            offset = window = None
        elif window is not None and window >= query.shape[2] + offset:
            window = None
    if query.is_cuda and softcap is None and bias is None and offset is None:
        part = _device_attention(query, keys, values, scale)
        if part is not None:
            return part
    if softcap is None and bias is None and offset is None:
        fast = compiled("cpu_rows")
        if fast is not None and fast.attends_chunks(query, keys, values):
            attended: Partial = fast.attend_chunks(query, keys, values, scale)
            return attended
    if cpu.supports(query, values, softcap, offset, window) and (
        offset is None or num_keys == query.shape[2]
    ):
        return cpu.partial_attention(query, keys, values, scale=scale, bias=bias, offset=offset)
    return reference.partial_attention(
        query,
        keys,
        values,
        scale=scale,
        bias=bias,
        softcap=softcap,
        offset=offset,
        window=window,
    )


def _device_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial | None:
    if not _has_triton(query.device):
        return None
    triton_chunks = importlib.import_module("offload.kernels.triton_chunks")
    if not triton_chunks.supports(query, keys, values):
        return None
    part: Partial = triton_chunks.attend_chunks(query, keys, values, scale=scale)
    return part


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether kernels can be compiled for a device; products of bfloat16 and of bytes need 8.0."""
    if find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _require_triton(device: torch.device) -> None:
    if not _has_triton(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ConfigError(
            f"sparse policies on {device} need triton and a device of capability 8.0 or more; "
            f"this one has {major}.{minor}"
        )


def scan(tables: ScanTables, query: Tensor, budget: int, group: Combine) -> Scan:
    """Find the best tokens and estimate the others; see ``kernels.scan`` for the contract.

    On a CUDA device it is queued on the current stream, without waiting. Thread-safe: no state.
    """
    if query.is_cuda and _has_triton(query.device):
        triton_scan = importlib.import_module("offload.kernels.triton_scan")
        if triton_scan.supports(tables, query):
            queued: Scan = triton_scan.scan(tables, query, budget, group)
            return queued
    fast = compiled("cpu_scan")
    if fast is not None and fast.supports(tables, query):
        found: Scan = fast.scan(tables, query, budget, group)
        return found
    return reference_scan(tables, query, budget, group)


def attend_rows(
    query: Tensor,
    addresses: Tensor,
    value_dim: int,
    dtype: torch.dtype,
    rows_per_address: int = 1,
) -> Partial:
    """Attend to rows named by their addresses; see ``kernels.rows`` for the contract.

    On a CUDA device addresses are the device's own or unified ones, of one row each. Thread-safe:
    no state.

    Raises
    ------
    ConfigError
        A CUDA device without triton: nothing else reads by address there.
    """
    if query.is_cuda:
        assert rows_per_address == 1
        _require_triton(query.device)
        triton_rows = importlib.import_module("offload.kernels.triton_rows")
        heads = query.to(dtype).flatten(0, 1)[None, :, None]
        found: Partial = triton_rows.attend_rows(heads, addresses[None], value_dim, scale=1.0)
        shape = query.shape[:2]
        return Partial(found.out.view(*shape, -1).float(), found.lse.view(shape))
    fast = compiled("cpu_rows")
    if fast is not None and fast.supports(dtype, query.shape[2], value_dim):
        part: Partial = fast.attend_rows(query, addresses, rows_per_address, value_dim, dtype)
        return part
    return rows.attend_rows(query, addresses, rows_per_address, value_dim, dtype)


def read_rows(addresses: Tensor, row_dim: int, dtype: torch.dtype) -> Tensor:
    """Copy rows named by their addresses; zero where there is none.

    Parameters
    ----------
    addresses : Tensor, int64 [num_heads, num_rows]
    row_dim : int
    dtype : torch.dtype

    Returns
    -------
    Tensor, shape (num_heads, num_rows, row_dim), on the device of the addresses
    """
    if addresses.is_cuda:
        _require_triton(addresses.device)
        triton_gather = importlib.import_module("offload.kernels.triton_gather")
        out = torch.zeros(addresses.numel(), row_dim, dtype=dtype, device=addresses.device)
        slots = torch.arange(addresses.numel(), device=addresses.device)
        triton_gather.gather_rows(addresses.flatten(), slots, out)
        return out.view(*addresses.shape, row_dim)
    fast = compiled("cpu_rows")
    if fast is not None:
        copied: Tensor = fast.read_rows(addresses, row_dim, dtype)
        return copied
    return rows.read_rows(addresses, 1, row_dim, dtype)[0]


@functools.cache
def compiled(name: str) -> ModuleType | None:
    """Return a module of kernels for CPUs; None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    module = importlib.import_module(f"offload.kernels.{name}")
    remove_stale(module)
    return module
