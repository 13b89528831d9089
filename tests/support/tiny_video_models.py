"""Tiny random video models of every kind that streams, and a tokenizer of single letters."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from offload.video.adapter import VideoAdapter
from offload.video.adapters import find_adapter
from offload.video.types import Frame

_SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|video_pad|>", "<|image_pad|>", "<video>", "<image>"),
)
_IDS = {token: number for number, token in enumerate((*_SPECIAL, *map(chr, range(32, 127)), "\n"))}
_GAINS = {"embed_tokens": 0.1, "down_proj": 1.5}

_TEXT: dict[str, Any] = {
    "vocab_size": len(_IDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
_LLAVA_IDS: dict[str, Any] = {
    "video_token_index": _IDS["<video>"],
    "image_token_index": _IDS["<image>"],
}
_QWEN_IDS: dict[str, Any] = {
    "video_token_id": _IDS["<|video_pad|>"],
    "image_token_id": _IDS["<|image_pad|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
}


def _onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**_TEXT),
        vision_config=transformers.SiglipVisionConfig(**_TOWER),
        **_LLAVA_IDS,
    )


def _next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_TOWER),
        **_LLAVA_IDS,
    )


def _qwen25() -> Any:
    text = {**_TEXT, "rope_parameters": _mrope(2, 3, 3), "max_position_embeddings": 4096}
    tower = {**_QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 32, "tokens_per_second": 2}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _qwen3() -> Any:
    text = {**_TEXT, "head_dim": 16, "rope_parameters": _mrope(4, 2, 2)}
    tower = {**_QWEN_TOWER, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section)}


_CONFIGS: dict[str, Callable[[], Any]] = {
    "llava_onevision": _onevision,
    "llava_next_video": _next_video,
    "qwen2_5_vl": _qwen25,
    "qwen3_vl": _qwen3,
}
KINDS = tuple(_CONFIGS)
"""Names of adapters."""


@cache
def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single letters; that of LLaVA-NeXT begins every text with ``<s>``."""
    core = Tokenizer(models.WordLevel(_IDS, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if name == "llava_next_video":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", _IDS["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(_SPECIAL[3:]),
    )


@cache
def tiny_video_model(name: str) -> Any:
    """Build a random model: float32, CPU, one per process.

    Matrices have unit gain and embeddings are small, so that attention and positions, more than the
    last token, decide what comes next. Most other seeds give answers that repeat one letter.
    """
    model = transformers.AutoModelForImageTextToText.from_config(_CONFIGS[name]())
    model.float().eval().requires_grad_(requires_grad=False)
    torch.manual_seed(1)
    for where, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kind = where.split(".")[-2] if "language_model" in where else ""
            nn.init.normal_(parameter, std=_GAINS.get(kind, 1.0) * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tiny_options(name: str) -> dict[str, Any]:
    """Return what an adapter is told, so that a unit has few tokens."""
    return {"min_tokens": 1, "max_tokens": 6} if name.startswith("qwen") else {}


def tiny_adapter(name: str) -> VideoAdapter:
    """Return the adapter of a tiny model."""
    return find_adapter(tiny_video_model(name), tiny_tokenizer(name), **tiny_options(name))


def make_frames(count: int, fps: float = 1.0, size: tuple[int, int] = (32, 48)) -> list[Frame]:
    """Return random frames, ``size`` their height and width."""
    rng = np.random.default_rng(7)
    return [
        Frame(number / fps, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for number in range(count)
    ]


def text_of(name: str, ids: Sequence[int]) -> str:
    """Return tokens as the answerer does."""
    return str(tiny_tokenizer(name).decode(list(ids), skip_special_tokens=True)).strip()
