"""What every mode is built from: prompts, one call of ``generate``, and what it produced."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tests.support.models import VOCAB_SIZE

CacheFactory = Callable[[], Cache]
"""Returns a new, empty cache."""

NEW_TOKENS = 6
"""Tokens generated per call."""

CHOICE_ERROR = 5e-3
"""Largest difference of logits where rounding may decide which of two tokens that are alike is read
and which is estimated: up to 2e-4 was seen; one lost key gives 1e-2 and more."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mode produced.

    Attributes
    ----------
    tokens : sequence of Tensor
        Generated ids, prompts included; int64 ``[rows, num_tokens]`` each.
    logits : sequence of Tensor
        Raw logits of every step, float32 ``[rows, ..., VOCAB_SIZE]`` each.
    """

    tokens: Sequence[Tensor]
    logits: Sequence[Tensor]


def prompt(batch: int, num_tokens: int, seed: int = 1) -> Tensor:
    """Draw token ids that are neither padding nor an end, int64 ``[batch, num_tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (batch, num_tokens), generator=generator)


def padded_prompt(lengths: Sequence[int]) -> dict[str, Tensor]:
    """Draw a left-padded batch with rows of the given lengths, and its attention mask."""
    ids = prompt(len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def release(cache: Cache) -> None:
    """Close a cache if it is one that has something to close."""
    close = getattr(cache, "close", None)
    if close is not None:
        close()


def join(outcomes: Sequence[Outcome]) -> Outcome:
    """Put the outcomes of several calls together."""
    tokens = [tensor for outcome in outcomes for tensor in outcome.tokens]
    return Outcome(tokens, [tensor for outcome in outcomes for tensor in outcome.logits])


def generate(model: Any, cache: Cache, **arguments: Any) -> Outcome:
    """Call ``model.generate`` with a cache and a fixed seed, and keep its logits."""
    torch.manual_seed(7)
    arguments.setdefault("do_sample", False)
    result = model.generate(
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return Outcome([result.sequences], list(result.logits))


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, ids: Tensor, steps: int = NEW_TOKENS) -> Outcome:
    """Continue a cache by hand: feed ``ids`` at once, then the best token of each step."""
    tokens, logits = [ids], []
    for _ in range(steps):
        out = model(tokens[-1], past_key_values=cache).logits[:, -1]
        logits.append(out)
        tokens.append(out.argmax(-1, keepdim=True))
    return Outcome([torch.cat(tokens, 1)], logits)
