"""Generate for a batch in parts that take turns: one computes while another one's attention waits.

What a layer asks of storage-side workers, and what it reads from disk, it has to wait for. With two
parts on threads of their own the device computes for one meanwhile (InstInfer, arXiv 2409.04992).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from offload.cache import OffloadedCache
from offload.errors import ConfigError


def generate_in_turns(
    model: PreTrainedModel,
    input_ids: Tensor,
    open_cache: Callable[[], OffloadedCache],
    *,
    num_parts: int = 2,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Call ``model.generate`` for parts of a batch side by side.

    Parameters
    ----------
    model : PreTrainedModel
    input_ids : Tensor, int64 [batch, num_tokens]
    open_cache : callable
        Returns a new cache, one for each part; they share the memory and disk of the machine, so
        each should have its part of the capacities. Closed at the end.
    num_parts : int
    attention_mask : Tensor, shape (batch, num_tokens), optional
    **options
        For ``model.generate``; must not say that it returns more than tokens.

    Returns
    -------
    Tensor, int64 [batch, num_tokens + num_new_tokens]
        In the order of ``input_ids``; shorter ones are padded as ``generate`` does.

    Raises
    ------
    ConfigError
        There are more parts than rows.

    Notes
    -----
    Random choices are not those of the whole batch, because parts draw at the same time.
    """
    if not 1 <= num_parts <= len(input_ids):
        raise ConfigError(f"a batch of {len(input_ids)} rows cannot be divided into {num_parts}")
    masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with open_cache() as cache:
            generate: Any = model.generate
            found: Tensor = generate(ids, attention_mask=mask, past_key_values=cache, **options)
        return found

    with ThreadPoolExecutor(num_parts, thread_name_prefix="offload-part") as pool:
        parts = list(pool.map(run, input_ids.chunk(num_parts), masks.chunk(num_parts)))
    longest = max(part.shape[1] for part in parts)
    filler = _pad_token(model, options)
    return torch.cat([pad(part, (0, longest - part.shape[1]), value=filler) for part in parts])


def _pad_token(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Return what ``generate`` fills finished rows up with."""
    config = options.get("generation_config") or model.generation_config
    for name in ("pad_token_id", "eos_token_id"):
        token = options.get(name, getattr(config, name, None))
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
