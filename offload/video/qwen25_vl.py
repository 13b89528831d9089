"""Qwen2.5-VL: two frames to a unit, which only time tells from the next."""

from collections.abc import Sequence
from typing import Any

from offload.errors import ConfigError
from offload.video.adapter import Unit
from offload.video.pixels import CLIP_MEAN, CLIP_STD
from offload.video.qwen_vl import ANSWER, QwenVL, Sight

_BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
)
_BEHIND = "<|vision_end|>"
_LONGEST_S = 600.0
"""Of a unit. A camera that was away for a day must not move what it saw before out of reach."""


class Qwen25VL(QwenVL):
    """An adapter of ``Qwen2_5_VLForConditionalGeneration``.

    All frames of a video stand at the same rows and columns, and text goes on right behind those,
    however long the video is: only the axis of time counts units, in steps of the time that each
    lasts. transformers has one such step for a video. Here each unit has its own, twice the time
    between its two frames, so that nobody has to say how fast a stream is; the same numbers come
    out where frames are evenly spaced.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
    tokenizer
    templates, mean, std, min_tokens, max_tokens
        As for ``QwenVL``.
    """

    name = "qwen2_5_vl"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str, str] = (_BEFORE, _BEHIND, ANSWER),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        **limits: int,
    ) -> None:
        super().__init__(model, tokenizer, templates=templates, mean=mean, std=std, **limits)
        if self.frames_per_unit < 2:
            raise ConfigError(
                f"{self.name}: {self.frames_per_unit} frame to a unit; how long a unit lasts is "
                "known from 2"
            )
        self._positions_per_s = float(model.config.vision_config.tokens_per_second)

    def unit(self, sight: Sight) -> Unit:
        """Return frames as a unit, which lasts for twice the time between them."""
        first, last = sight.frames[0].time_s, sight.frames[-1].time_s
        count = len(sight.frames)
        lasts_s = min((last - first) * count / (count - 1), _LONGEST_S)
        step = (lasts_s * self._positions_per_s, 0.0, 0.0)
        return Unit(sight.rows, sight.positions(), sight.extent, first, count, step, last_s=last)
