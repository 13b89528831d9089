"""What ``offload generate`` does with a model: it continues a text."""

import argparse
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from offload.cache import OffloadedCache
from offload.cli_progress import token_progress
from offload.errors import ConfigError
from offload.prefill import prefill
from offload.stats import CacheStats


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What one run produced; ``--json`` prints it field by field.

    Attributes
    ----------
    text : str
        What follows the prompt.
    prompt_tokens, new_tokens : int
        The prompt follows the text of the session, which counts.
    resumed_tokens : int
        Of those before the new ones: what the cache had from a session, and no prefill was for.
    prefill_s : float
        For the others, but for the last token.
    decode_s : float
        For that one and the new ones.
    stats : CacheStats
        At the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    resumed_tokens: int
    prefill_s: float
    decode_s: float
    stats: CacheStats


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, past: Tensor | None) -> Tensor:
    """Return the tokens of a prompt, after those of the text it continues.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : str
    past : Tensor or None, int64 [1, num_tokens]

    Returns
    -------
    Tensor, int64 [1, num_tokens]
    """
    # A text begins once: no second mark of it where a session goes on.
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=past is None)["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError(f"the tokenizer makes no token of the prompt ({len(prompt)} characters)")
    return ids if past is None else torch.cat([past, ids], 1)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: OffloadedCache,
    token_ids: Tensor,
    args: argparse.Namespace,
) -> tuple[Generation, Tensor]:
    """Continue a text, streaming to standard output unless JSON is wanted.

    Parameters
    ----------
    model, tokenizer
    cache : OffloadedCache
        May hold a beginning of the text.
    token_ids : Tensor, int64 [1, num_tokens]
    args : argparse.Namespace

    Returns
    -------
    Generation
    Tensor, int64 [1, num_tokens]
        The text and what follows it.
    """
    num_prompt_tokens, num_resumed = token_ids.shape[1], int(cache.get_seq_length())
    missing = token_ids[:, num_resumed:-1]
    started = time.perf_counter()
    with token_progress("reading the prompt", missing.shape[1]) as advance:
        prefill(model, cache, missing, args.prefill_chunk_size, advance)
    prefilled = time.perf_counter()
    torch.manual_seed(args.seed)
    call: Any = model.generate  # mypy does not see it on PreTrainedModel
    output = call(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        past_key_values=cache,
        max_new_tokens=args.max_new_tokens,
        streamer=None if args.json else TextStreamer(tokenizer, True, skip_special_tokens=True),
        **sampling(args.temperature, args.top_p),
    )
    decoded = time.perf_counter()
    new_ids = output[0, num_prompt_tokens:]
    generation = Generation(
        text=str(tokenizer.decode(new_ids, skip_special_tokens=True)),
        prompt_tokens=num_prompt_tokens,
        new_tokens=len(new_ids),
        resumed_tokens=num_resumed,
        prefill_s=prefilled - started,
        decode_s=decoded - prefilled,
        stats=cache.stats(),
    )
    return generation, output


def sampling(heat: float, top_p: float) -> dict[str, Any]:
    """Return the arguments of ``model.generate`` for a temperature; zero is greedy."""
    if heat == 0:
        # The model's own settings would be refused, or warned about, without sampling.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": heat, "top_p": top_p, "top_k": 0}
