"""Pictures as models want them: resized, scaled, normalised. Without torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from offload.video.types import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(
    images: Sequence[Image],
    size: tuple[int, int],
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Resize pictures (bicubic, antialiased), scale them to 0 to 1, and normalise them.

    Parameters
    ----------
    images : sequence of ndarray, uint8 [height, width, 3]
        Of any sizes.
    size : tuple of int
        Height and width.
    mean, std : sequence of float
        Of each colour.

    Returns
    -------
    Tensor, float32 [num_images, 3, height, width]
    """
    done = []
    for image in images:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        if pixels.shape[2:] != size:
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True)
            pixels = pixels.round_().clamp_(0, 255)
        done.append(pixels)
    scale = torch.tensor(std).view(3, 1, 1)
    return (torch.cat(done) / 255 - torch.tensor(mean).view(3, 1, 1)) / scale
