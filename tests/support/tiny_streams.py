"""Streams of tiny video models, and the positions that the models themselves give a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.video.encoder import StreamEncoder
from offload.video.stream import VideoStream
from offload.video.types import Frame
from tests.support.tiny_video_models import tiny_adapter, tiny_video_model

WIDE = 10**6
"""A window that covers everything, in tokens."""


class TinyStreams:
    """Streams of a test, which end with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.open: list[VideoStream] = []

    def encode(
        self, name: str, frames: Sequence[Frame], pieces: int, window: int = WIDE
    ) -> VideoStream:
        """Encode frames, ``pieces`` of them at a time."""
        path = self._folder / str(len(self.open))
        path.mkdir()
        stream = VideoStream(
            tiny_adapter(name),
            tiers=["gpu", "disk"],
            capacity={"gpu": "64KiB", "disk": "64MiB"},
            disk_path=path,
            chunk_tokens=16,
        )
        self.open.append(stream)
        encoder = StreamEncoder(stream, window)
        for start in range(0, len(frames), pieces):
            encoder.add(frames[start : start + pieces])
        return stream


def own_positions(name: str, prompt: dict[str, Any]) -> Tensor:
    """Return the positions of a prompt as the model counts them, [num_axes, num_tokens]."""
    ids = prompt["input_ids"]
    if not name.startswith("qwen"):
        return torch.arange(ids.shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    wanted = {key: prompt[key] for key in names if key in prompt}
    positions: Tensor = tiny_video_model(name).model.get_rope_index(**wanted)[0][:, 0]
    return positions
