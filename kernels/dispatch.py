"""Choose the fastest kernel that gives the reference answer on the tensors at hand."""

from torch import Tensor

from offload.kernels import cpu, reference
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
