"""Loading the model of BadgeWorld that ships with the package: docs/badge-world.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from offload.packaged_model import load_packaged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase

    from offload.video.types import Image


def load_badge_model(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase]:
    """Load the model and its word-level tokenizer from the installed package.

    Reads local files only and touches no network. Both are ordinary ``transformers`` objects.

    Parameters
    ----------
    dtype : torch.dtype
        Of the weights and hence of the KV cache: ``float32`` or ``bfloat16``.

    Returns
    -------
    model : LlavaOnevisionForConditionalGeneration
        On the CPU, in evaluation mode: a SigLIP tower that makes four tokens of a frame of 32 x 32
        pixels, and a Qwen2 of four layers with two KV heads of 32 dimensions each.
    tokenizer : PreTrainedTokenizerBase
        One token per word; a badge number is a word. Its chat template puts the frames first.
    """
    return load_packaged("LlavaOnevisionForConditionalGeneration", "badge_model", dtype)


def badge_pixels(images: Sequence[Image]) -> Tensor:
    """Return what the vision tower takes: each channel from -1 to 1.

    Parameters
    ----------
    images : sequence of ndarray, uint8 [32, 32, 3], RGB

    Returns
    -------
    Tensor, shape (len(images), 3, 32, 32), float32
    """
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1
