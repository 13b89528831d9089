"""Tiny random video models of every kind that streams, a tokenizer, and whole prompts of them.

The prompts are made by transformers' own processors. They are given pixels that are resized and
normalised, because only that part of them needs torchvision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llava_next_video.processing_llava_next_video import (
    LlavaNextVideoProcessor,
)
from transformers.models.llava_next_video.video_processing_llava_next_video import (
    LlavaNextVideoVideoProcessor,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.llava_onevision.video_processing_llava_onevision import (
    LlavaOnevisionVideoProcessor,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from offload.video.adapter import VideoAdapter
from offload.video.adapters import find_adapter
from offload.video.types import Frame

_SPECIAL = (
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|video_pad|>", "<|image_pad|>", "<video>", "<image>"),
)
_LETTERS = tuple(map(chr, range(32, 127))) + ("\n",)
_IDS = {token: number for number, token in enumerate((*_SPECIAL, *_LETTERS))}
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
_QWEN_IDS = {
    "video_token_id": _IDS["<|video_pad|>"],
    "image_token_id": _IDS["<|image_pad|>"],
    "vision_start_token_id": _IDS["<|vision_start|>"],
    "vision_end_token_id": _IDS["<|vision_end|>"],
}
_LLAVA_IDS = {"video_token_index": _IDS["<video>"], "image_token_index": _IDS["<image>"]}
_QWEN_USER = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class TinyKind:
    """A row of the matrix.

    Attributes
    ----------
    config : callable
        Makes the configuration.
    processor : callable
        Makes transformers' processor, of a tokenizer.
    prompt : str
        A chat about a video, ``{}`` where the question goes.
    options : dict
        Of the adapter.
    """

    config: Callable[[], Any]
    processor: Callable[[Any], Any]
    prompt: str
    options: dict[str, Any]


def _without_torchvision(kind: type) -> Any:
    """Return a processor class that takes parts whose registry needs torchvision."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})


def _qwen25() -> Any:
    text = {**_TEXT, "rope_parameters": _mrope([2, 3, 3]), "max_position_embeddings": 4096}
    tower = {**_QWEN_TOWER, "fullatt_block_indexes": [1], "window_size": 32, "tokens_per_second": 2}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _qwen3() -> Any:
    text = {**_TEXT, "head_dim": 16, "rope_parameters": _mrope([4, 2, 2])}
    tower = {**_QWEN_TOWER, "deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}


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


def _qwen_processor(kind: type) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2, cap_pixels_per_frame=False)
        image = Qwen2VLImageProcessorPil(patch_size=8)
        return _without_torchvision(kind)(image, tokenizer, video)

    return build


def _onevision_processor(tokenizer: Any) -> Any:
    return _without_torchvision(LlavaOnevisionProcessor)(
        Qwen2VLImageProcessorPil(),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _next_video_processor(tokenizer: Any) -> Any:
    return _without_torchvision(LlavaNextVideoProcessor)(
        LlavaNextVideoVideoProcessor(),
        Qwen2VLImageProcessorPil(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
    )


_GAINS = {"embed_tokens": 0.1, "down_proj": 1.5}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FEW_TOKENS = {"min_tokens": 1, "max_tokens": 6}
KINDS: dict[str, TinyKind] = {
    "llava_onevision": TinyKind(
        _onevision,
        _onevision_processor,
        _SYSTEM + "<|im_start|>user\n<video>{}" + _ASSISTANT,
        {},
    ),
    "llava_next_video": TinyKind(
        _next_video, _next_video_processor, "USER: <video>\n{} ASSISTANT:", {}
    ),
    "qwen2_5_vl": TinyKind(
        _qwen25,
        _qwen_processor(Qwen2_5_VLProcessor),
        _SYSTEM + _QWEN_USER + "{}" + _ASSISTANT,
        _FEW_TOKENS,
    ),
    "qwen3_vl": TinyKind(
        _qwen3, _qwen_processor(Qwen3VLProcessor), _QWEN_USER + "{}" + _ASSISTANT, _FEW_TOKENS
    ),
}


@cache
def tiny_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single letters; Llama's begins every text with ``<s>``."""
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
    last token, decide what comes next. Other seeds give answers that repeat one letter.
    """
    model = transformers.AutoModelForImageTextToText.from_config(KINDS[name].config())
    torch.manual_seed(1)
    model.float().eval().requires_grad_(requires_grad=False)
    for where, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kind = where.split(".")[-2] if "language_model" in where else ""
            gain = _GAINS.get(kind, 1.0)
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tiny_adapter(name: str) -> VideoAdapter:
    """Return the adapter of a tiny model, with limits so that a unit has few tokens."""
    return find_adapter(tiny_video_model(name), tiny_tokenizer(name), **KINDS[name].options)


def make_frames(count: int, fps: float = 1.0, size: tuple[int, int] = (32, 48)) -> list[Frame]:
    """Return random frames, ``size`` their height and width; none has to be resized at 32 x 48."""
    rng = np.random.default_rng(7)
    return [
        Frame(number / fps, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for number in range(count)
    ]


def whole_prompt(name: str, pixels: Tensor, question: str, fps: float) -> dict[str, Any]:
    """Return what ``generate`` takes, as transformers' processor makes it.

    Parameters
    ----------
    name : str
    pixels : Tensor, float32 [num_frames, 3, height, width]
        Resized and normalised.
    question : str
    fps : float
        Frames per second.
    """
    kind, count = KINDS[name], len(pixels)
    made = kind.processor(tiny_tokenizer(name))(
        text=[kind.prompt.format(question)],
        videos=[pixels],
        video_metadata=[
            VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        ],
        return_tensors="pt",
        **dict.fromkeys(
            ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"),
            False,
        ),
        do_sample_frames=False,
    )
    return {key: value for key, value in made.items() if key != "video_metadata"}


def plain_pixels(name: str, frames: Sequence[Frame]) -> Tensor:
    """Return frames that need no resizing as ``whole_prompt`` takes them, step by step."""
    edge = 8 if name == "llava_next_video" else 0
    images = np.stack([frame.image for frame in frames])[:, :, edge : edge + 32 if edge else None]
    mean, std = ([0.5] * 3, [0.5] * 3) if name == "qwen3_vl" else (_CLIP_MEAN, _CLIP_STD)
    scaled = (images / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()


def text_of(name: str, ids: Sequence[int]) -> str:
    """Return tokens as the answerer does."""
    return str(tiny_tokenizer(name).decode(ids, skip_special_tokens=True)).strip()

