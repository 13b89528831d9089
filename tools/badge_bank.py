"""Pictures to train and to examine the badge model on: drawn once, half of them through H.264.

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

NUM_COLOURS: Final = len(COLOURS)
QUALITIES: Final = (18, 23, 28, 33)
"""Constant rate factors, an eighth of the pictures each; the other half stays as drawn."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Pictures and what they show: every badge ``num_drawings`` times, then as many idle frames.

    Attributes
    ----------
    images : list of Image
        Badge ``b`` is in rows ``b * num_drawings`` to ``(b + 1) * num_drawings``.
    colours : Tensor, shape (NUM_BADGES * num_drawings,), int64
        Places in ``COLOURS``.
    num_drawings : int
    """

    images: list[Image]
    colours: Tensor
    num_drawings: int

    @property
    def num_shown(self) -> int:
        """How many pictures show a badge; the others follow them."""
        return len(self.colours)

    @property
    def badges(self) -> Tensor:
        """The badge in each picture that shows one, shape (num_shown,), int64."""
        return torch.arange(NUM_BADGES).repeat_interleave(self.num_drawings)


def draw_bank(num_drawings: int, num_idle: int, seed: int) -> Bank:
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    colours = rng.integers(NUM_COLOURS, size=NUM_BADGES * num_drawings)
    images = [
        draw_badge(row // num_drawings, names[colour], rng) for row, colour in enumerate(colours)
    ]
    images += [draw_idle(rng) for _ in range(num_idle)]
    rows = rng.permutation(len(images))
    share = len(images) // (2 * len(QUALITIES))
    for part, crf in enumerate(QUALITIES):
        chosen = rows[part * share : (part + 1) * share]
        for row, image in zip(chosen, compress([images[row] for row in chosen], crf), strict=True):
            images[row] = image
    return Bank(images, torch.from_numpy(colours), num_drawings)


def compress(images: Sequence[Image], crf: int) -> list[Image]:
    """Return what is left of pictures after H.264."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.mp4"
        write_mp4(path, (Frame(float(i), image) for i, image in enumerate(images)), crf=crf)
        with av.open(path) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
