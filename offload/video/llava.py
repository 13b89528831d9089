"""What the LLaVA models have in common: one frame to a unit, positions on one axis."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offload.video.adapter import Unit, VideoAdapter
from offload.video.pixels import CLIP_MEAN, CLIP_STD
from offload.video.types import Frame, Image


class LlavaAdapter(VideoAdapter):
    """A tower, a projector and a text model.

    Parameters
    ----------
    model, tokenizer
    templates : tuple of str, optional
        What comes before the first frame, and between question and answer.
    mean, std : sequence of float
        Of the pictures the model was trained on.
    """

    default_templates: tuple[str, str]
    num_closing = 0
    """Rows that transformers puts behind the frames of a call, and that are no frame's."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str] | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        super().__init__(model, tokenizer)
        self._before, self._after = templates or self.default_templates
        self._mean, self._std = mean, std

    @property
    def text_model(self) -> Any:
        """The language model inside."""
        return self.model.model.language_model

    @abstractmethod
    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Return what the tower takes, ``[num_images, 3, side, side]`` float32."""

    @torch.no_grad()
    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        """Turn each frame into a unit."""
        config = self.model.config
        pixels = self.pixels([frame.image for frame in frames])
        rows = self.model.model.get_video_features(
            pixels.to(self.device, self.dtype)[None],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output[0]
        rows = rows[: len(rows) - self.num_closing]
        units = []
        for frame, embeds in zip(frames, rows.chunk(len(frames)), strict=True):
            steps = torch.arange(len(embeds), device=embeds.device)[None]
            units.append(Unit(embeds, steps, len(embeds), frame.time_s, 1))
        return units
