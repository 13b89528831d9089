"""LLaVA-OneVision: one frame to a unit, positions on one axis."""

from collections.abc import Sequence
from typing import Any

import torch

from offload.video.adapter import Unit, VideoAdapter
from offload.video.pixels import CLIP_MEAN, CLIP_STD, normalised
from offload.video.types import Frame

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


class LlavaOnevision(VideoAdapter):
    """An adapter of ``LlavaOnevisionForConditionalGeneration``.

    The ``image_newline`` that transformers puts behind every call's frames comes once, before the
    question: fed with every chunk of a stream it would be wrong in silence.

    Parameters
    ----------
    model : LlavaOnevisionForConditionalGeneration
    tokenizer
    templates : tuple of str
        What comes before the first frame, and between question and answer; those of the Qwen2 chat
        format unless given.
    mean, std : sequence of float
        Of the pictures the model was trained on.
    """

    name = "llava_onevision"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str] = (_SYSTEM, _ANSWER),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__(model, tokenizer)
        self._before, self._after = templates
        self._mean, self._std = mean, std

    @property
    def text_model(self) -> Any:
        """The Qwen2 inside."""
        return self.model.model.language_model

    @torch.no_grad()
    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        """Turn each frame into a unit."""
        side = self.model.config.vision_config.image_size
        images = [frame.image for frame in frames]
        pixels = normalised(images, (side, side), self._mean, self._std)
        pixels = pixels.to(self.device, self.dtype)[None]
        rows = self.model.model.get_video_features(
            pixels,
            vision_feature_layer=self.model.config.vision_feature_layer,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
        ).pooler_output[0, :-1]
        units = []
        for frame, embeds in zip(frames, rows.chunk(len(frames)), strict=True):
            steps = torch.arange(len(embeds), device=embeds.device)[None]
            units.append(Unit(embeds, steps, len(embeds), frame.time_s, 1))
        return units

    def opening(self) -> list[int]:
        """Return the tokens before the first frame."""
        return self.token_ids(self._before)

    def asking(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question, and those up to the answer."""
        return self.token_ids(question), self.token_ids(self._after)

    def closing(self) -> Unit:
        """Return the ``image_newline``."""
        embeds = self.model.model.image_newline[None].to(self.device)
        return Unit(embeds, torch.zeros(1, 1, dtype=torch.long, device=self.device), 1, 0.0, 0)
