"""Qwen3-VL: two frames to a unit, with the time written in front; features for three layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offload.video.adapter import Unit
from offload.video.qwen_vl import ANSWER, QwenVL, Sight

_BEFORE = "<|im_start|>user\n<|vision_start|>"
_BEHIND = "<|vision_end|>"
_HALF = (0.5, 0.5, 0.5)


class Qwen3VL(QwenVL):
    """An adapter of ``Qwen3VLForConditionalGeneration``.

    A unit is ``<0.5 seconds><|vision_start|>``, its tokens, ``<|vision_end|>``: the time is the
    mean of its frames', and the number of its digits makes units of different lengths.

    Parameters
    ----------
    model : Qwen3VLForConditionalGeneration
    tokenizer
    templates, mean, std, min_tokens, max_tokens
        As for ``QwenVL``. The pair of ``<|vision_start|>`` and ``<|vision_end|>`` around all units
        is what transformers 5.10 and later make of the chat template; releases before it had none.
    """

    name = "qwen3_vl"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        templates: tuple[str, str, str] = (_BEFORE, _BEHIND, ANSWER),
        mean: Sequence[float] = _HALF,
        std: Sequence[float] = _HALF,
        **limits: int,
    ) -> None:
        super().__init__(model, tokenizer, templates=templates, mean=mean, std=std, **limits)

    def unit(self, sight: Sight) -> Unit:
        """Return frames, and the text around them, as a unit."""
        first, last = sight.frames[0].time_s, sight.frames[-1].time_s
        mean_s = (first + last) / 2
        front = self.text(self.token_ids(f"<{mean_s:.1f} seconds><|vision_start|>"))
        back = self.text(self.token_ids("<|vision_end|>"))
        end = front.advance + sight.extent
        return Unit(
            torch.cat([front.embeds, sight.rows, back.embeds]),
            torch.cat(
                [front.positions, sight.positions() + front.advance, back.positions + end], 1
            ),
            end + back.advance,
            first,
            len(sight.frames),
            added=_padded(sight.levels, front.num_tokens, back.num_tokens),
            last_s=last,
        )

    def added_inputs(self, added: Tensor) -> dict[str, Any]:
        """Return features for the first layers; text among them adds zero."""
        everywhere = torch.ones(1, added.shape[1], dtype=torch.bool, device=added.device)
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(added)}


def _padded(levels: Sequence[Tensor], before: int, behind: int) -> Tensor | None:
    """Put zeros around features, ``[num_levels, num_tokens, hidden_size]``."""
    if not levels:
        return None
    return torch.nn.functional.pad(torch.stack(list(levels)), (0, 0, before, behind))
