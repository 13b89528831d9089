"""LLaVA-OneVision: one frame to a unit, positions on one axis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.video.adapter import Unit
from offload.video.llava import LlavaAdapter
from offload.video.pixels import normalised
from offload.video.types import Image

_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


class LlavaOnevision(LlavaAdapter):
    """An adapter of ``LlavaOnevisionForConditionalGeneration``; see ``LlavaAdapter``.

    Templates are those of the Qwen2 chat format unless given. The ``image_newline`` that
    transformers puts behind every call's frames comes once, before the question: fed with every
    chunk of a stream it would be wrong in silence.
    """

    name = "llava_onevision"
    num_closing = 1
    default_templates = (_SYSTEM, _ANSWER)

    @property
    def unit_tokens(self) -> int:
        """Patches of a frame, pooled two by two."""
        vision = self.model.config.vision_config
        edge = -(-(vision.image_size // vision.patch_size) // 2)
        return int(edge**2)

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Resize pictures to the square that the tower sees."""
        side = int(self.model.config.vision_config.image_size)
        return normalised(images, (side, side), self._mean, self._std)

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
