"""Estimates of queries: exact from a layer's own input, and refused where they would be wrong."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

from offload import ConfigError, OffloadedCache
from offload.lookahead import LookAhead, look_ahead
from tests.support.generation import prompt
from tests.support.models import make_model

ESTIMABLE = [
    "llama",
    "llama_mha",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "qwen3_moe",
    "granite",
    "smollm3",
    "glm4",
    "starcoder2",
    "nemotron",
]


def small_cache(tmp_path: Path) -> OffloadedCache:
    return OffloadedCache(
        ["gpu", "disk"], capacity={"gpu": 1 << 20, "disk": 1 << 20}, disk_path=tmp_path
    )


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def estimates_and_truth(
    model: Any, ahead: LookAhead, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Run one token; return queries by layer, estimated from the layer's own input and asked."""
    estimated: dict[int, Tensor] = {}
    asked: dict[int, Tensor] = {}
    look_up = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        original = look_up(self, name, default)

        def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            asked[module.layer_idx] = query[:, :, 0] * kwargs["scaling"]
            return original(module, query, *args, **kwargs)

        return attention

    def estimate(layer: Any, args: Any, kwargs: Any) -> None:
        index = layer.self_attn.layer_idx
        own = ahead.estimates[index]
        estimated[index] = own.query(args[0], kwargs["position_embeddings"])

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(2, 20), past_key_values=cache)
        monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)
        hooks = [
            own.layer.register_forward_pre_hook(estimate, with_kwargs=True)
            for own in ahead.estimates
        ]
        model(prompt(2, 1), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return estimated, asked


@pytest.mark.parametrize("architecture", ESTIMABLE)
def test_query_estimated_from_a_layers_own_input_is_what_the_layer_asks(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(architecture, "eager")
    with small_cache(tmp_path) as cache, look_ahead(model, cache) as ahead:
        estimated, asked = estimates_and_truth(model, ahead, monkeypatch)
    assert estimated.keys() == asked.keys() == set(range(model.config.num_hidden_layers))
    for index, query in asked.items():
        assert torch.equal(estimated[index], query)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gpt2", "GPT2LMHeadModel: its GPT2Model has no 'layers'"),
        ("opt", "layer 0, OPTDecoderLayer, has no 'input_layernorm'"),
        ("olmo2", "has no 'input_layernorm'"),
        ("phi3", "Phi3DecoderLayer, has no 'self_attn.q_proj'"),
        ("gpt_neox", "has no 'self_attn.q_proj'"),
        ("phi", "rotates some dimensions of a query itself"),
        ("stablelm", "rotates some dimensions of a query itself"),
        ("gemma3", "layer 0 has a DynamicSlidingWindowLayer"),
        ("mistral_sliding", "layer 0 has a DynamicSlidingWindowLayer"),
        ("falcon_h1", "layer 0 has a LinearAttentionAndFullAttentionLayer"),
        ("deepseek_v3", "it caches latents"),
    ],
)
def test_model_whose_queries_cannot_be_estimated_is_refused_by_what_it_lacks(
    architecture: str, message: str, tmp_path: Path
) -> None:
    model = make_model(architecture, "eager")
    before = num_hooks(model)
    with (
        small_cache(tmp_path) as cache,
        pytest.raises(ConfigError, match=message),
    ):
        look_ahead(model, cache)
    assert num_hooks(model) == before


def test_hooks_are_on_all_layers_but_the_last_until_they_are_removed(tmp_path: Path) -> None:
    model = make_model("llama")
    before = num_hooks(model)
    with small_cache(tmp_path) as cache:
        with look_ahead(model, cache) as ahead:
            assert num_hooks(model) == before + model.config.num_hidden_layers - 1
        assert num_hooks(model) == before
        ahead.remove()
        assert num_hooks(model) == before


def test_cache_that_nobody_else_holds_is_gone_while_its_hooks_remain(tmp_path: Path) -> None:
    model = make_model("llama")
    cache = small_cache(tmp_path)
    ahead, known = look_ahead(model, cache), weakref.ref(cache)
    del cache
    assert known() is None
    with torch.no_grad():
        assert model(prompt(1, 1), past_key_values=DynamicCache()).logits.isfinite().all()
    ahead.remove()
