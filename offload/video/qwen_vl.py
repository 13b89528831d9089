"""What Qwen2.5-VL and Qwen3-VL share: two frames to a unit, positions on three axes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.video.adapter import Unit, VideoAdapter
from offload.video.patches import fitting_size, patches
from offload.video.pixels import normalised
from offload.video.types import Frame

MIN_TOKENS = 128
"""Of the frames of a unit: the least that Qwen's processors make of a frame."""

ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
"""What comes between a question and its answer."""


class Sight(NamedTuple):
    """What the vision tower makes of the frames of a unit.

    Attributes
    ----------
    frames : sequence of Frame
    rows : Tensor, shape (height * width, hidden_size)
        A token for each place, row by row.
    height, width : int
        In tokens.
    levels : list of Tensor, shape (height * width, hidden_size)
        Features of earlier layers of the tower, if the model has them (DeepStack).
    """

    frames: Sequence[Frame]
    rows: Tensor
    height: int
    width: int
    levels: list[Tensor]

    @property
    def extent(self) -> int:
        """How far positions reach."""
        return max(self.height, self.width)

    def positions(self) -> Tensor:
        """Return positions from where the frames start: time, row, column, int64 [3, num_tokens].

        Frames that are seen together stand at one point of time.
        """
        device = self.rows.device
        rows = torch.arange(self.height, device=device).repeat_interleave(self.width)
        columns = torch.arange(self.width, device=device).repeat(self.height)
        return torch.stack([torch.zeros_like(rows), rows, columns])


class QwenVL(VideoAdapter):
    """An adapter of one of Qwen's models for pictures and video.

    Their processors share a budget of pixels among all frames of a video. A stream has no end, so
    here each unit has its own.

    Parameters
    ----------
    model, tokenizer
    templates : tuple of str
        What comes before the first frame, between the last one and a question, and between question
        and answer.
    mean, std : sequence of float
        Of the pictures the model was trained on.
    min_tokens, max_tokens : int
        Of the frames of a unit. Pictures are resized to fit.

    Raises
    ------
    ConfigError
        The limits contradict each other.
    """

    option_names = VideoAdapter.option_names | {"min_tokens", "max_tokens"}

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str, str],
        mean: Sequence[float],
        std: Sequence[float],
        min_tokens: int = MIN_TOKENS,
        max_tokens: int = 768,
    ) -> None:
        super().__init__(model, tokenizer)
        if not 1 <= min_tokens <= max_tokens:
            raise ConfigError(
                f"{self.name}: {min_tokens} to {max_tokens} tokens for the frames of a unit; at "
                "least one, and no more at least than at most"
            )
        self._before, self._behind, self._after = templates
        self._mean, self._std = mean, std
        self._tokens = (min_tokens, max_tokens)
        vision = model.config.vision_config
        self._patch_size, self._merge_size = vision.patch_size, vision.spatial_merge_size
        self.frames_per_unit = int(vision.temporal_patch_size)

    @property
    def text_model(self) -> Any:
        """The Qwen inside."""
        return self.model.model.language_model

    @property
    def num_axes(self) -> int:
        """Time, row and column."""
        return 3

    @torch.no_grad()
    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        """Turn each pair of frames into a unit."""
        each = self.frames_per_unit
        whole = len(frames) // each * each
        groups = [frames[start : start + each] for start in range(0, whole, each)]
        return [self.unit(sight) for sight in self._look(groups)] if groups else []

    @abstractmethod
    def unit(self, sight: Sight) -> Unit:
        """Return the unit of frames that were looked at."""

    def opening(self) -> list[int]:
        """Return the tokens before the first frame."""
        return self.token_ids(self._before)

    def closing(self) -> Unit:
        """Return the text that ends a video."""
        return self.text(self.token_ids(self._behind))

    def asking(self, question: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question, and those up to the answer."""
        return self.token_ids(question), self.token_ids(self._after)

    def _look(self, groups: Sequence[Sequence[Frame]]) -> list[Sight]:
        """Run the vision tower once over frames of any sizes."""
        cut, grids = [], []
        for frames in groups:
            pixels = self._pixels(frames)
            cut.append(patches(pixels, self._patch_size, self._merge_size))
            grids.append([1, *(edge // self._patch_size for edge in pixels.shape[2:])])
        found = self.model.model.get_video_features(
            torch.cat(cut).to(self.device, self.dtype), torch.tensor(grids, device=self.device)
        )
        levels = list(zip(*getattr(found, "deepstack_features", ()), strict=True))
        merge = self._merge_size
        return [
            Sight(frames, rows, height // merge, width // merge, list(above))
            for frames, rows, (_, height, width), above in zip(
                groups, found.pooler_output, grids, levels or [()] * len(groups), strict=True
            )
        ]

    def _pixels(self, frames: Sequence[Frame]) -> Tensor:
        """Give frames that are seen together the size that fits the first."""
        factor = self._patch_size * self._merge_size
        height, width = frames[0].image.shape[:2]
        least, most = (count * factor**2 for count in self._tokens)
        size = fitting_size(height, width, factor, least, most)
        return normalised([frame.image for frame in frames], size, self._mean, self._std)
