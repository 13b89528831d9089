"""Whole prompts about a video, made by transformers' own processors.

The processors are given pixels that are resized and normalised already, because only that part of
them needs torchvision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
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

from offload.video.types import Frame
from tests.support.tiny_video_models import make_frames, tiny_tokenizer

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_QWEN_USER = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_PROMPTS = {
    "llava_onevision": _SYSTEM + "<|im_start|>user\n<video>{}" + _ASSISTANT,
    "llava_next_video": "USER: <video>\n{} ASSISTANT:",
    "qwen2_5_vl": _SYSTEM + _QWEN_USER + "{}" + _ASSISTANT,
    "qwen3_vl": _QWEN_USER + "{}" + _ASSISTANT,
}
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NEEDS_TORCHVISION = (
    *("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"),
)


def plain_frames(name: str, count: int, fps: float = 1.0) -> list[Frame]:
    """Return random frames of a size that the adapter of a tiny model leaves as it is."""
    return make_frames(count, fps, (32, 32) if name == "llava_onevision" else (32, 48))


def whole_prompt(name: str, frames: Sequence[Frame], question: str, fps: float) -> dict[str, Any]:
    """Return what ``generate`` takes.

    Parameters
    ----------
    name : str
        Of an adapter.
    frames : sequence of Frame
        Of ``plain_frames``.
    question : str
    fps : float
        Frames per second.
    """
    count = len(frames)
    made = _PROCESSORS[name](tiny_tokenizer(name))(
        text=[_PROMPTS[name].format(question)],
        videos=[_pixels(name, frames)],
        video_metadata=[
            VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        ],
        return_tensors="pt",
        do_sample_frames=False,
        **dict.fromkeys(_NEEDS_TORCHVISION, False),
    )
    return {key: value for key, value in made.items() if key != "video_metadata"}


def _pixels(name: str, frames: Sequence[Frame]) -> Tensor:
    """Crop and normalise frames, float32 [num_frames, 3, height, width]."""
    images = np.stack([frame.image for frame in frames])
    if name == "llava_next_video":
        images = images[:, :, 8:40]
    mean, std = _HALF if name == "qwen3_vl" else _CLIP
    scaled = (images / 255.0 - np.array(mean)) / np.array(std)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()


def _taking_any_parts(kind: type) -> Any:
    """Return a processor that does not look its parts up in lists that need torchvision."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda *_: None})


def _qwen(kind: type) -> Callable[[Any], Any]:
    def build(tokenizer: Any) -> Any:
        video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2, cap_pixels_per_frame=False)
        return _taking_any_parts(kind)(Qwen2VLImageProcessorPil(patch_size=8), tokenizer, video)

    return build


def _onevision(tokenizer: Any) -> Any:
    return _taking_any_parts(LlavaOnevisionProcessor)(
        Qwen2VLImageProcessorPil(),
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def _next_video(tokenizer: Any) -> Any:
    return _taking_any_parts(LlavaNextVideoProcessor)(
        LlavaNextVideoVideoProcessor(),
        Qwen2VLImageProcessorPil(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
    )


_PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "llava_onevision": _onevision,
    "llava_next_video": _next_video,
    "qwen2_5_vl": _qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": _qwen(Qwen3VLProcessor),
}
