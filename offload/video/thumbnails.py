"""Small pictures of all frames, so that evidence can be shown without the video."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.video.types import Frame, Image

_SIDE = 160
"""Pixels of the longer side: some 8 KB, 14 MB for an hour of a frame every two seconds."""

_BYTES, _ENDS = "video.thumbnails", "video.thumbnail_ends"


class Thumbnails:
    """JPEG pictures by the number of the frame. Without Pillow none are kept."""

    def __init__(self) -> None:
        self._pictures: list[bytes] = []
        self._can_make = find_spec("PIL") is not None

    def __len__(self) -> int:
        return len(self._pictures)

    def add(self, frames: Sequence[Frame]) -> None:
        """Keep pictures of the next frames."""
        if self._can_make:
            self._pictures += [_shrunk(frame.image) for frame in frames]

    def get(self, frame: int) -> Image:
        """Return the picture of a frame.

        Raises
        ------
        ConfigError
            There is none: Pillow was not there when it was encoded, or is not now.
        """
        if frame >= len(self._pictures) or not self._can_make:
            raise ConfigError(
                f"no picture of frame {frame}: {len(self._pictures)} were kept; they need Pillow: "
                "pip install 'kv-offload[video]'"
            )
        from PIL import Image as Pictures

        with Pictures.open(io.BytesIO(self._pictures[frame])) as picture:
            return np.asarray(picture.convert("RGB"))

    def pack(self) -> dict[str, Tensor]:
        """Return the pictures as tensors, to be saved."""
        joined = np.frombuffer(b"".join(self._pictures), np.uint8).copy()
        ends = np.cumsum([len(each) for each in self._pictures], dtype=np.int64)
        return {_BYTES: torch.from_numpy(joined), _ENDS: torch.from_numpy(ends)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over pictures that were saved."""
        joined, start = tensors[_BYTES].numpy().tobytes(), 0
        self._pictures = []
        for end in tensors[_ENDS].tolist():
            self._pictures.append(joined[start:end])
            start = end


def _shrunk(image: Image) -> bytes:
    from PIL import Image as Pictures

    picture: Any = Pictures.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=80)
    return out.getvalue()
