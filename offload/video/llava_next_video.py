"""LLaVA-NeXT-Video: one frame to a unit, positions on one axis."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.video.llava import LlavaAdapter
from offload.video.pixels import normalised
from offload.video.types import Image

_USER = "USER: "
_ANSWER = " ASSISTANT:"


class LlavaNextVideo(LlavaAdapter):
    """An adapter of ``LlavaNextVideoForConditionalGeneration``; see ``LlavaAdapter``.

    Templates are those of Vicuna unless given; the first one comes behind what the tokenizer puts
    in front of every text. Frames are resized by their shorter edge and lose what then hangs over,
    as in the processor of transformers.
    """

    name = "llava_next_video"
    default_templates = (_USER, _ANSWER)

    @property
    def unit_tokens(self) -> int:
        """Patches of a frame, pooled by the stride of the model."""
        config = self.model.config
        vision = config.vision_config
        edge = vision.image_size // vision.patch_size // config.spatial_pool_stride
        return int(edge**2)

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Resize each picture by its shorter edge, and cut out the middle."""
        return torch.cat([self._cut(image) for image in images])

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

    def _cut(self, image: Image) -> Tensor:
        side = int(self.model.config.vision_config.image_size)
        short = min(image.shape[:2])
        height, width = (side * edge // short for edge in image.shape[:2])
        pixels = normalised([image], (height, width), self._mean, self._std)
        top, left = (height - side) // 2, (width - side) // 2
        return pixels[..., top : top + side, left : left + side]
