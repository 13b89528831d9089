"""Tiny random models of many architectures, and capacities that make a cache use every tier.

Every matrix is drawn with unit gain, so that attention decides as much as anything else which token
comes next: a wrong key or value changes tokens, and rounding does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from offload.types import PAGE_BYTES, ChunkLayout

VOCAB_SIZE = 96
"""Token ids of every model here; 0 is the padding, 1 may end a beam, 2 starts a text."""

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
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _hybrid(kind: str, **fields: object) -> dict[str, Any]:
    """Return the fields of a four-layer model whose even layers do not grow."""
    return {
        "num_hidden_layers": 4,
        "layer_types": [kind, "full_attention"] * 2,
        "sliding_window": 24,
        **fields,
    }


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the matrix.

    Attributes
    ----------
    config_class : str
        Name in ``transformers``.
    overrides : mapping
        What differs from the common configuration.
    offloads : bool
        Whether any layer grows without bound, so that there is something to offload.
    """

    config_class: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    offloads: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig"),
    "llama_mha": Architecture("LlamaConfig", {"num_key_value_heads": 4, "attention_bias": True}),
    "qwen2": Architecture("Qwen2Config"),
    "qwen3": Architecture("Qwen3Config"),
    "mistral": Architecture("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": Architecture("MistralConfig", {"sliding_window": 24}, offloads=False),
    "moshi": Architecture(
        "MoshiConfig",
        {"sliding_window": 256, "ffn_dim": 96, "audio_vocab_size": VOCAB_SIZE},
        offloads=False,
    ),
    "gemma2": Architecture("Gemma2Config", _hybrid("sliding_attention", query_pre_attn_scalar=16)),
    "gemma3": Architecture(
        "Gemma3TextConfig", _hybrid("sliding_attention", query_pre_attn_scalar=16)
    ),
    "phi3": Architecture("Phi3Config"),
    "gpt_oss": Architecture("GptOssConfig", _hybrid("sliding_attention", **_LOCAL_MOE)),
    "mixtral": Architecture("MixtralConfig", {"sliding_window": None, **_LOCAL_MOE}),
    "qwen3_moe": Architecture("Qwen3MoeConfig", _MOE),
    "qwen3_next": Architecture(
        "Qwen3NextConfig",
        _hybrid(
            "linear_attention",
            **_MOE,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=32,
        ),
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
    "gpt2": Architecture("GPT2Config", {"num_key_value_heads": 4}),
    "gpt_neox": Architecture("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "olmo2": Architecture("Olmo2Config"),
    "granite": Architecture("GraniteConfig"),
    "cohere2": Architecture("Cohere2Config", _hybrid("sliding_attention", logit_scale=1.0)),
    "smollm3": Architecture("SmolLM3Config", {"no_rope_layers": [1, 1, 0]}),
    "glm4": Architecture("Glm4Config"),
    "starcoder2": Architecture("Starcoder2Config", {"sliding_window": None}),
    "stablelm": Architecture("StableLmConfig"),
    "phi": Architecture("PhiConfig"),
    "nemotron": Architecture("NemotronConfig"),
    "exaone4": Architecture("Exaone4Config", _hybrid("sliding_attention")),
    "lfm2": Architecture("Lfm2Config", _hybrid("conv")),
    "opt": Architecture("OPTConfig", {"num_key_value_heads": 4, "ffn_dim": 96}),
    "falcon_h1": Architecture(
        "FalconH1Config",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 24,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
        },
    ),
}

UNSUPPORTED: dict[str, Architecture] = {
    "diffllama": Architecture("DiffLlamaConfig"),
    "jetmoe": Architecture("JetMoeConfig", {"kv_channels": 16, **_LOCAL_MOE}),
    "bloom": Architecture("BloomConfig", {"n_head": 4, "n_layer": 3}),
    "mpt": Architecture("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 3}),
    "gpt_neox_japanese": Architecture("GPTNeoXJapaneseConfig"),
    "bert": Architecture("BertConfig"),
    "roberta": Architecture("RobertaConfig"),
    "rembert": Architecture("RemBertConfig", {"is_decoder": True}),
}
"""Models that edit their keys or values after caching them, route attention elsewhere, or look
ahead. None of them can be offloaded, and each has to be told so."""


@cache
def make_model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Build a random model: eval mode, float32, CPU. One per process and arguments.

    Parameters
    ----------
    name : str
        A key of ``ARCHITECTURES`` or ``UNSUPPORTED``.
    attention : {"sdpa", "eager"}
    seed : int

    Raises
    ------
    ValueError
        transformers has no such attention for the architecture.
    """
    row = ARCHITECTURES[name] if name in ARCHITECTURES else UNSUPPORTED[name]
    config = getattr(transformers, row.config_class)(**{**_COMMON, **row.overrides})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.float().eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


@cache
def cached_layouts(model: PreTrainedModel, chunk_tokens: int) -> tuple[ChunkLayout, ...]:
    """Return the chunk layout of each layer whose cache grows without bound.

    Measured on one token, because only the model knows what it caches (MLA caches latents).
    """
    stock = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[2]]), past_key_values=stock)
    layouts = []
    for layer in stock.layers:
        if isinstance(layer, DynamicLayer) and not layer.is_sliding:
            assert layer.keys is not None
            assert layer.values is not None
            heads, key_dim, value_dim = *layer.keys.shape[1::2], layer.values.shape[3]
            layouts.append(ChunkLayout(heads, chunk_tokens, key_dim, value_dim, layer.keys.dtype))
    return tuple(layouts)


def tight_capacity(model: PreTrainedModel, batch: int, chunk_tokens: int) -> dict[str, int]:
    """Return capacities in bytes so small that 40 tokens of two layers need all three tiers.

    Per row, the device has room for the tails, for three staging buffers of one chunk, and for one
    chunk more; the host for one chunk beside the two write buffers.

    Parameters
    ----------
    model : PreTrainedModel
    batch : int
        Most rows the cache will hold, beams and forks included.
    chunk_tokens : int
    """
    layouts = cached_layouts(model, chunk_tokens)
    slot = layouts[0].slot_bytes if layouts else PAGE_BYTES
    tails = sum(layout.chunk_bytes for layout in layouts) * batch
    return {"gpu": tails + 4 * batch * slot, "cpu": (2 + batch) * slot, "disk": 4096 * slot}
