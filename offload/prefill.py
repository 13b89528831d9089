"""Read a prompt into a cache in pieces, so that no activation is as long as the prompt."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    token_ids: Tensor,
    piece_tokens: int,
    advance: Callable[[int], None],
) -> None:
    """Run tokens through a model, for what that leaves in the cache; computes no logits.

    ``model.generate`` may go on with the same cache and the same tokens and at least one more.

    Parameters
    ----------
    model : PreTrainedModel
    cache : Cache
        The tokens are added to it.
    token_ids : Tensor, shape (batch, num_tokens), int64
        Without padding.
    piece_tokens : int
        Tokens per forward pass.
    advance : callable
        Told after each pass how many tokens were read.
    """
    # A short piece comes first: at the end, sparse policies would take it for a question.
    first = token_ids.shape[1] % piece_tokens
    pieces = [token_ids[:, :first]] if first else []
    for piece in [*pieces, *token_ids[:, first:].split(piece_tokens, 1)]:
        if piece.shape[1]:
            model.base_model(input_ids=piece, past_key_values=cache, use_cache=True)
            advance(piece.shape[1])
