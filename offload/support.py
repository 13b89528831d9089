"""Which models can be offloaded, told from their config before any work is done."""

import sys
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from offload import _compat
from offload.errors import ConfigError

_INSTEAD = "use DynamicCache(offloading=True) or DynamicCache() with this model"


def check_model_config(config: Any) -> None:
    """Raise ConfigError if a model with this text config cannot use an ``OffloadedCache``."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name} is an encoder-decoder; OffloadedCache is for decoders. {_INSTEAD}"
        )
    if getattr(config, "is_causal", True) is False:
        raise ConfigError(f"{name} attends bidirectionally; {_INSTEAD}")
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    module = sys.modules.get(model.__module__) if isinstance(model, type) else None
    if module is not None and not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        raise ConfigError(
            f"{model.__name__} does not route attention through transformers' attention "
            f"interface, so its cache cannot stay off the device; {_INSTEAD}"
        )


def latent_dims(config: Any) -> tuple[int, int] | None:
    """Return the widths of the latents an MLA model caches, (key part, rotary part), or None."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank is None or not _compat.CACHES_LATENTS:
        return None
    return int(rank), int(config.qk_rope_head_dim)
