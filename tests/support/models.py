"""Tiny random models of many architectures, and capacities that make them use every tier.

The weights are drawn wide, so that the two best logits are far apart: a wrong key or value changes
tokens, and rounding does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel



VOCAB_SIZE = 96
"""Token ids of every model here; 0 is the padding and 1 may end a beam."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": None,
}
_SLIDING_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LINEAR_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the matrix.

    Attributes
    ----------
    config_class : str
        Name in ``transformers``.
    overrides : mapping
        What differs from the common configuration; None removes a field.
    since : str
        First transformers release (``major.minor``) whose configuration takes these fields.
    """

    config_class: str
    overrides: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig"),
    "llama_mha": Architecture("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True}),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config"),
    "mistral": Architecture("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": Architecture("MistralConfig", {"sliding_window": 24}),
    "gemma2": Architecture(
        "Gemma2Config",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": _SLIDING_HYBRID,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": _SLIDING_HYBRID,
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": Architecture("Phi3Config"),
    "gpt_oss": Architecture(
        "GptOssConfig",
        {
            "num_hidden_layers": 4,
            "sliding_window": 24,
            "layer_types": _SLIDING_HYBRID,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": Architecture(
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "qwen3_moe": Architecture("Qwen3MoeConfig", _MOE),
    "qwen3_next": Architecture(
        "Qwen3NextConfig",
        {
            **_MOE,
            "num_hidden_layers": 4,
            "layer_types": _LINEAR_HYBRID,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt2": Architecture("GPT2Config", _GPT2),
    "gpt_neox": Architecture("GPTNeoXConfig", {"num_key_value_heads": None}),
    "olmo2": Architecture("Olmo2Config"),
    "granite": Architecture("GraniteConfig"),
    "cohere2": Architecture(
        "Cohere2Config",
        {"num_hidden_layers": 4, "sliding_window": 24, "layer_types": _SLIDING_HYBRID},
    ),
    "smollm3": Architecture("SmolLM3Config", {"no_rope_layers": [1, 1, 0]}),
    "glm4": Architecture("Glm4Config"),
    "starcoder2": Architecture("Starcoder2Config", {"sliding_window": None}),
    "stablelm": Architecture("StableLmConfig"),
    "phi": Architecture("PhiConfig"),
    "nemotron": Architecture("NemotronConfig"),
    "exaone4": Architecture(
        "Exaone4Config",
        {"num_hidden_layers": 4, "sliding_window": 24, "layer_types": _SLIDING_HYBRID},
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    ),
}


@dataclass(frozen=True, slots=True)
class CachedStates:
    """What one layer of a model puts into its cache for one token of one row."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int


@lru_cache(maxsize=None)
def make_model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Build a random model in eval mode, float32, on the CPU; one per process and arguments.

    Parameters
    ----------
    name : str
        A key of ``ARCHITECTURES``.
    attention : {"sdpa", "eager"}
    seed : int

    Raises
    ------
    ValueError, ImportError
        transformers has no such attention for the architecture.
    """
    row = ARCHITECTURES[name]
    fields = {k: v for k, v in {**_COMMON, **row.overrides}.items() if v is not None or k in _COMMON}
    if fields.get("num_key_value_heads", 0) is None:
        del fields["num_key_value_heads"]
    config = getattr(transformers, row.config_class)(**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(torch.float32).eval().requires_grad_(False)
    _draw_weights(model)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def _draw_weights(model: PreTrainedModel) -> None:
    """Give every matrix unit gain, and the unembedding four times that."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
