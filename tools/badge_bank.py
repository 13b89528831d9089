"""Pictures to train the badge model on: drawn once, half of them sent through H.264.

What a badge looks like after a codec is learned from the codec itself, at several qualities.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import av
import numpy as np
import torch
from torch import Tensor

from offload.video.badge_world import COLOURS, NUM_BADGES, draw_badge, draw_idle, write_mp4
from offload.video.types import Frame, Image

COLOUR_NAMES: Final = tuple(COLOURS)
QUALITIES: Final = (18, 23, 28, 33)
"""Constant rate factors, for an eighth of the pictures each; the other half stays as drawn."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Pictures and what they show: every badge ``num_drawings`` times, then idle frames.

    Attributes
    ----------
    images : list of Image
        Badge ``b`` is in places ``b * num_drawings`` to ``(b + 1) * num_drawings``.
    colours : Tensor, shape (NUM_BADGES * num_drawings,), int64
        Places in ``COLOUR_NAMES``.
    num_drawings : int
    """

    images: list[Image]
    colours: Tensor
    num_drawings: int

    @property
    def num_shown(self) -> int:
        """How many pictures show a badge; the others follow them."""
        return len(self.colours)


def draw_bank(num_drawings: int, num_idle: int, seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    colours = rng.integers(len(COLOUR_NAMES), size=NUM_BADGES * num_drawings)
    images = [
        draw_badge(place // num_drawings, COLOUR_NAMES[colour], rng)
        for place, colour in enumerate(colours)
    ]
    images += [draw_idle(rng) for _ in range(num_idle)]
    share = len(images) // (2 * len(QUALITIES))
    shuffled = rng.permutation(len(images))
    for part, crf in enumerate(QUALITIES):
        places = shuffled[part * share : (part + 1) * share]
        decoded = compress([images[place] for place in places], crf)
        for place, image in zip(places, decoded, strict=True):
            images[place] = image
    return Bank(images, torch.from_numpy(colours), num_drawings)


def compress(images: Sequence[Image], crf: int) -> list[Image]:
    """Return what is left of a video after H.264."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.mp4"
        write_mp4(path, (Frame(float(i), image) for i, image in enumerate(images)), crf=crf)
        with av.open(path) as container:
            frames = container.decode(video=0)
            return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in frames]
