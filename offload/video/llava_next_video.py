"""LLaVA-NeXT-Video: one frame to a unit, positions on one axis."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offload.video.adapter import Unit, VideoAdapter
from offload.video.pixels import CLIP_MEAN, CLIP_STD, normalised
from offload.video.types import Frame, Image

_USER = "USER: "
_ANSWER = " ASSISTANT:"


class LlavaNextVideo(VideoAdapter):
    """An adapter of ``LlavaNextVideoForConditionalGeneration``.

    Frames are resized by their shorter edge and lose what then hangs over, as in the processor of
    transformers.

    Parameters
    ----------
    model : LlavaNextVideoForConditionalGeneration
    tokenizer
    templates : tuple of str
        What comes before the first frame, behind what the tokenizer puts in front of every text,
        and between question and answer; those of Vicuna unless given.
    mean, std : sequence of float
        Of the pictures the model was trained on.
    """

    name = "llava_next_video"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str] = (_USER, _ANSWER),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__(model, tokenizer)
        self._before, self._after = templates
        self._mean, self._std = mean, std

    @property
    def text_model(self) -> Any:
        """The Llama inside."""
        return self.model.model.language_model

    @torch.no_grad()
    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        """Turn each frame into a unit."""
        config = self.model.config
        pixels = torch.cat([self._pixels(frame.image) for frame in frames])
        rows = self.model.model.get_video_features(
            pixels.to(self.device, self.dtype)[None],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output[0]
        units = []
        for frame, embeds in zip(frames, rows.chunk(len(frames)), strict=True):
            steps = torch.arange(len(embeds), device=embeds.device)[None]
            units.append(Unit(embeds, steps, len(embeds), frame.time_s, 1))
        return units

    def opening(self) -> list[int]:
        """Return the tokens before the first frame, with what the tokenizer begins texts with."""
        ids: list[int] = self.tokenizer(self._before)["input_ids"]
        return ids

    def asking(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question, and those up to the answer.

        They are cut from the tokens of both together: where words are pieces, a text is not always
        the tokens of its parts.
        """
        alone = self.token_ids(f"\n{question}")
        both = self.token_ids(f"\n{question}{self._after}")
        same = 0
        while same < min(len(alone), len(both)) and alone[same] == both[same]:
            same += 1
        return both[:same], both[same:]

    def _pixels(self, image: Image) -> Tensor:
        side = int(self.model.config.vision_config.image_size)
        short = min(image.shape[:2])
        height, width = (side * edge // short for edge in image.shape[:2])
        pixels = normalised([image], (height, width), self._mean, self._std)
        top, left = (height - side) // 2, (width - side) // 2
        return pixels[..., top : top + side, left : left + side]
