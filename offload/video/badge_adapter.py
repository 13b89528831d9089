"""The small model of BadgeWorld, ready to stream."""

from collections.abc import Sequence

import torch

from offload.video.badge_model import load_badge_model
from offload.video.llava_onevision import LlavaOnevision

_HALF = (0.5, 0.5, 0.5)


class BadgeAdapter(LlavaOnevision):
    """Its prompt is nothing but frames and a question of single words (docs/badge-world.md)."""

    def choosing(self, choices: Sequence[str]) -> str:
        """Return nothing: it knows its colours, and what is asked for has to come last."""
        return ""


def badge_adapter(
    dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> BadgeAdapter:
    """Return an adapter of the model that ships with the package."""
    model, tokenizer = load_badge_model(dtype)
    if device is not None:
        torch.nn.Module.to(model, device)
    before = tokenizer.bos_token or ""
    return BadgeAdapter(model, tokenizer, templates=(before, ""), mean=_HALF, std=_HALF)
