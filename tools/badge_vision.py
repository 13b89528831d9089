"""First phase: the vision tower and the projector learn to read frames.

Every token of a frame has to say all that the frame shows, by itself, to linear heads that are
thrown away. Heads over the joined tokens of a frame would leave digits and colour in different
tokens, and the language model would have to bring them together, one hop more than it learns.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaOnevisionForConditionalGeneration

from offload.video.badge_model import badge_pixels
from tools.badge_bank import COLOUR_NAMES, Bank
from tools.badge_config import HIDDEN_SIZE, TOKENS_PER_FRAME

NUM_SHOWN: Final = 116
NUM_IDLE: Final = 12
HEAD_SIZES: Final = (10, 10, len(COLOUR_NAMES), 2)
"""Classes of the heads: tens, ones, colour, whether there is a badge at all."""


class VisionPhase:
    """Steps that teach the vision tower; see ``tools.train_badge_model.Phase``."""

    name = "vision"
    num_steps = 2500
    learning_rate = 3e-3

    def __init__(
        self, model: LlavaOnevisionForConditionalGeneration, bank: Bank, seed: int
    ) -> None:
        self._model = model
        self._bank = bank
        self._rng = torch.Generator().manual_seed(seed)
        self._heads = nn.ModuleList(nn.Linear(HIDDEN_SIZE, size) for size in HEAD_SIZES)

    def parameters(self) -> list[nn.Parameter]:
        eyes = (self._model.model.vision_tower, self._model.model.multi_modal_projector)
        return [p for module in (*eyes, self._heads) for p in module.parameters()]

    def loss_and_accuracy(self, step: int) -> tuple[Tensor, float]:
        """Read one batch; right is a token that knows both digits and the colour."""
        bank, rng = self._bank, self._rng
        shown = torch.randint(bank.num_shown, (NUM_SHOWN,), generator=rng)
        idle = torch.randint(bank.num_shown, len(bank.images), (NUM_IDLE,), generator=rng)
        places = torch.cat([shown, idle]).tolist()
        tokens = embed_frames(self._model, badge_pixels([bank.images[place] for place in places]))
        *what, whether = self._heads
        badges = shown // bank.num_drawings
        targets = (badges // 10, badges % 10, bank.colours[shown])
        loss = per_token_loss(whether(tokens), torch.arange(len(places)) < NUM_SHOWN)
        is_right = torch.ones(NUM_SHOWN, TOKENS_PER_FRAME, dtype=torch.bool)
        for head, target in zip(what, targets, strict=True):
            logits = head(tokens[:NUM_SHOWN])
            loss = loss + per_token_loss(logits, target)
            is_right &= logits.argmax(-1) == target[:, None]
        return loss, is_right.float().mean().item()


def embed_frames(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the tokens of frames, (num_frames, TOKENS_PER_FRAME, HIDDEN_SIZE).

    The newline that ``get_video_features`` appends is left out.
    """
    tokens: Tensor = model.get_video_features(pixels[None]).pooler_output
    return tokens[0, :-1].view(len(pixels), TOKENS_PER_FRAME, HIDDEN_SIZE)


def per_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of ``logits`` (frames, tokens, classes): one target for all of a frame."""
    return cross_entropy(logits.mT, targets.long()[:, None].expand(logits.shape[:2]))
