"""Pages of SGLang: whose they are, where they lie in a pool, and their bytes."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from offload.errors import ConfigError
from offload.plugins.batch import Row
from offload.plugins.namespace import Namespace


def namespace_of(config: Any, pool: str, row_bytes: int) -> Namespace:
    """Return what pages of this engine have in common with those of others that are like it."""
    names = (
        "pp_rank",
        "pp_size",
        "attn_cp_rank",
        "attn_cp_size",
        "dp_rank",
        "dcp_rank",
        "dcp_size",
    )
    details = {name: getattr(config, name, None) for name in names}
    details |= {"pool": pool, "page_first": config.is_page_first_layout}
    return Namespace(
        engine="sglang",
        model=config.model_name or "",
        dtype=str((config.extra_config or {}).get("dtype", "")),
        row_bytes=row_bytes,
        block_tokens=getattr(config, "logical_page_size", None) or 0,
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        details=json.dumps(details, sort_keys=True),
    )


def row_of(page: torch.Tensor) -> Row:
    """Return the bytes of a contiguous tensor in host memory, not copied."""
    if page.device.type != "cpu" or not page.is_contiguous():
        raise ConfigError(
            f"a page is a contiguous tensor in host memory, not on {page.device} with strides "
            f"{page.stride()}"
        )
    row: Row = page.reshape(-1).view(torch.uint8).numpy()
    return row


def places_of(pool: Any, keys: Sequence[str], indices: torch.Tensor) -> list[int]:
    """Return where each page begins in a pool; SGLang names the places of all its tokens."""
    size = getattr(pool, "page_size", 1) or 1
    found = 0 if indices is None else indices.numel()
    if found != len(keys) * size:
        raise ConfigError(f"{len(keys)} pages of {size} tokens need as many places, not {found}")
    return [int(place) for place in indices[::size]]
