"""Second phase: the language model learns to find the frame of a badge and to name the colour.

The frames come from a bank that the vision tower, which no longer changes, has embedded once. A
sequence is a video of some of them and several questions about it, answered, one after another.
"""

import random
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaOnevisionForConditionalGeneration

from offload.video.badge_model import badge_pixels
from offload.video.badge_world import NUM_BADGES, PHRASES
from tools.badge_bank import Bank
from tools.badge_config import BOS_TOKEN_ID, EOS_TOKEN_ID, TOKEN_IDS
from tools.badge_vision import embed_frames

MAX_QUESTIONS: Final = 16
SHORTER_SHARE: Final = 0.3
MIN_BADGE_SHARE: Final = 0.3


class Stage(NamedTuple):
    """A part of the curriculum: so many steps on so many videos of one length."""

    num_frames: int
    num_videos: int
    num_steps: int


CURRICULUM: Final = (
    Stage(4, 64, 100),
    Stage(8, 48, 50),
    Stage(16, 32, 50),
    Stage(32, 16, 100),
    Stage(64, 8, 120),
    Stage(128, 4, 80),
)


class LanguagePhase:
    """Steps that teach the language model; see ``tools.train_badge_model.Phase``."""

    name = "language"
    num_steps = sum(stage.num_steps for stage in CURRICULUM)
    learning_rate = 2e-3

    def __init__(
        self, model: LlavaOnevisionForConditionalGeneration, bank: Bank, seed: int
    ) -> None:
        self._model = model
        self._bank = bank
        self._tokens = embed_bank(model, bank)
        self._rng = random.Random(seed)
        self._torch_rng = torch.Generator().manual_seed(seed)
        self._stages = schedule(self._rng)

    def parameters(self) -> list[nn.Parameter]:
        model = self._model
        text = (*model.model.language_model.parameters(), *model.lm_head.parameters())
        return [*text, model.model.image_newline]

    def loss_and_accuracy(self, step: int) -> tuple[Tensor, float]:
        """Answer one batch; the loss is on colours and ends, the accuracy of colours."""
        video, questions = self._batch(self._stages[step])
        model = self._model
        prompt = torch.cat([video, model.get_input_embeddings()(questions.flatten(1))], dim=1)
        hidden = model.model.language_model(inputs_embeds=prompt, use_cache=False)
        before = hidden.last_hidden_state[:, video.shape[1] - 1 : -1].unflatten(
            1, questions.shape[1:]
        )
        logits, targets = model.lm_head(before[:, :, -2:]), questions[:, :, -2:]
        loss = cross_entropy(logits.flatten(0, 2), targets.flatten())
        is_right = logits[:, :, 0].argmax(-1) == targets[:, :, 0]
        return loss, is_right.float().mean().item()

    def _batch(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """Return embedded videos, (videos, tokens, hidden), and the token ids of ``ask``.

        Half of the time there is a first token before the frames, half of the time a newline after
        them, so that the model works with either and without.
        """
        rng, bank = self._rng, self._bank
        embed, newline = self._model.get_input_embeddings(), self._model.model.image_newline
        num_badges = max(1, round(stage.num_frames * rng.uniform(MIN_BADGE_SHARE, 1)))
        badges = self._shuffles(stage.num_videos, NUM_BADGES)[:, :num_badges]
        num_idle = stage.num_frames - badges.shape[1]
        places = badges * bank.num_drawings + self._below(bank.num_drawings, badges.shape)
        idle = bank.num_shown + self._below(
            len(bank.images) - bank.num_shown, (stage.num_videos, num_idle)
        )
        order = self._shuffles(stage.num_videos, stage.num_frames)
        frames = torch.cat([places, idle], dim=1).gather(1, order)
        pieces = [self._tokens[frames].flatten(1, 2)]
        if rng.random() < 0.5:
            pieces.insert(0, embed(torch.full((stage.num_videos, 1), BOS_TOKEN_ID)))
        if rng.random() < 0.5:
            pieces.append(newline.expand(stage.num_videos, 1, -1))
        # The shortest one half of the time.
        phrase = rng.choice([PHRASES[0], rng.choice(PHRASES[1:])])
        return torch.cat(pieces, dim=1), ask(phrase, badges, bank.colours[places])

    def _shuffles(self, num_rows: int, length: int) -> Tensor:
        return torch.rand(num_rows, length, generator=self._torch_rng).argsort(1)

    def _below(self, limit: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(limit, shape, generator=self._torch_rng)


def schedule(rng: random.Random) -> list[Stage]:
    """Return the stage of each step: the curriculum, some steps on shorter videos."""
    return [
        rng.choice(CURRICULUM[: index + 1]) if rng.random() < SHORTER_SHARE else stage
        for index, stage in enumerate(CURRICULUM)
        for _ in range(stage.num_steps)
    ]


def ask(phrase: str, badges: Tensor, colours: Tensor) -> Tensor:
    """Return token ids of questions and their answers, (videos, questions, tokens).

    The last two tokens of each are the colour and the end.
    """
    badges, colours = badges[:, :MAX_QUESTIONS], colours[:, :MAX_QUESTIONS]
    words = torch.tensor([TOKEN_IDS[word] for word in phrase.split()])
    columns = [word.expand(badges.shape) for word in words]
    columns += [TOKEN_IDS["00"] + badges, TOKEN_IDS["red"] + colours]
    columns.append(torch.full(badges.shape, EOS_TOKEN_ID))
    return torch.stack(columns, dim=-1)


@torch.no_grad()
def embed_bank(model: LlavaOnevisionForConditionalGeneration, bank: Bank) -> Tensor:
    """Return the tokens of every picture of a bank, in pieces to keep the memory small."""
    starts = range(0, len(bank.images), 512)
    pieces = (badge_pixels(bank.images[start : start + 512]) for start in starts)
    return torch.cat([embed_frames(model, piece) for piece in pieces])
