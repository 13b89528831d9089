"""Every way to generate text that touches a cache differently.

A mode is a function ``(model, make_cache) -> Outcome`` that is the same for every cache, so that
two caches can be compared. Whatever it draws at random is drawn from fixed seeds. Caches that it
makes belong to the caller, who closes them; forks of them, it closes itself.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tests.support.generation import (
    CacheFactory,
    Outcome,
    decode,
    generate,
    join,
    padded_prompt,
    prompt,
    release,
)
from tests.support.models import make_model

Run = Callable[[PreTrainedModel, CacheFactory], Outcome]


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to generate.

    Attributes
    ----------
    rows : int
        Most rows that its cache ever holds, beams and forks included.
    run : callable
        Does it.
    """

    rows: int
    run: Run

    def __call__(self, model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
        """Run the mode."""
        return self.run(model, make_cache)


def _one_call(ids: Callable[[], dict[str, Tensor]], **arguments: Any) -> Run:
    def run(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
        return generate(model, make_cache(), **ids(), **arguments)

    return run


def _plain(batch: int, num_tokens: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": prompt(batch, num_tokens)}


def _padded(*lengths: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: padded_prompt(lengths)


def _repetitive() -> dict[str, Tensor]:
    """Return a prompt in which looking up earlier tokens finds candidates, right and wrong."""
    return {"input_ids": prompt(1, 11).repeat(1, 6)}


def assisted(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Let a small model draft, which is nearly always wrong: every step crops."""
    drafter = make_model("llama", "eager", seed=9)
    return generate(model, make_cache(), input_ids=prompt(1, 60), assistant_model=drafter)


def self_assisted(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Let the model draft for itself, which is always right: many tokens arrive at once."""
    return generate(model, make_cache(), input_ids=prompt(1, 60), assistant_model=model)


def three_turns(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Keep one cache over three turns, passing the whole conversation each time."""
    cache, outcomes, ids = make_cache(), [], prompt(2, 41)
    for turn in range(3):
        outcomes.append(generate(model, cache, input_ids=ids))
        ids = torch.cat([outcomes[-1].tokens[0], prompt(2, 5 + 6 * turn, seed=turn)], 1)
    return join(outcomes)


def padded_turns(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Continue a left-padded batch with a second turn."""
    cache, inputs = make_cache(), padded_prompt((52, 33))
    first = generate(model, cache, **inputs)
    ids = torch.cat([first.tokens[0], prompt(2, 9, seed=3)], 1)
    grown = torch.ones_like(ids)
    grown[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    second = generate(model, cache, input_ids=ids, attention_mask=grown)
    return join([first, second])


@torch.no_grad()
def prefix_forks(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Feed a shared prefix once, then continue deep copies of its cache, then the cache itself."""
    cache, prefix = make_cache(), prompt(1, 57)
    model(prefix, past_key_values=cache)
    forks = [copy.deepcopy(cache), copy.deepcopy(cache), cache]
    outcomes = []
    for i, fork in enumerate(forks):
        ids = torch.cat([prefix, prompt(1, 4 + 7 * i, seed=20 + i)], 1)
        outcomes.append(generate(model, fork, input_ids=ids))
    for fork in forks[:2]:
        release(fork)
    return join(outcomes)


@torch.no_grad()
def inputs_embeds(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Start from embeddings instead of ids."""
    embeds = model.get_input_embeddings()(prompt(2, 48))
    return generate(model, make_cache(), inputs_embeds=embeds)


def reset_and_reuse(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Empty a used cache and give it another text, with other rows."""
    cache = make_cache()
    first = generate(model, cache, input_ids=prompt(2, 50))
    cache.reset()
    second = generate(model, cache, input_ids=prompt(2, 44, seed=5))
    return join([first, second])


def _edited(batch: int, edit: Callable[[Cache], None], rows: int) -> Mode:
    """Return a mode that fills ``batch`` rows, edits the cache, and continues ``rows`` rows."""

    @torch.no_grad()
    def run(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
        cache = make_cache()
        model(prompt(batch, 53), past_key_values=cache)
        edit(cache)
        return decode(model, cache, prompt(rows, 3, seed=4))

    return Mode(max(batch, rows), run)


@torch.no_grad()
def crop_and_continue(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Take tokens back, many and few, and continue differently each time."""
    cache, outcomes = make_cache(), []
    record = getattr(cache, "activate_past_recording", None)  # transformers 5.14 and newer
    if record is not None:
        record()
    model(prompt(2, 60), past_key_values=cache)
    for i, removed in enumerate((30, 6, 1)):
        cache.crop(-removed)
        outcomes.append(decode(model, cache, prompt(2, 4, seed=30 + i), steps=4))
    return join(outcomes)


@torch.no_grad()
def pieces(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Feed a text in pieces of every kind of length, and look at the logits of every token."""
    cache, lengths = make_cache(), [1, 2, 13, 1, 16, 3, 32, 1, 1]
    ids = prompt(2, sum(lengths)).split(lengths, 1)
    logits = [model(piece, past_key_values=cache).logits for piece in ids]
    best = [step[:, -1].argmax(-1, keepdim=True) for step in logits]
    return Outcome([torch.cat(best, 1)], logits)


@torch.no_grad()
def masked_holes(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Hide tokens in the middle of the rows, also such as fill whole chunks."""
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, 9:31] = 0
    mask[1, ::3] = 0
    return generate(model, make_cache(), input_ids=ids, attention_mask=mask)


@torch.no_grad()
def tree_mask(model: PreTrainedModel, make_cache: CacheFactory) -> Outcome:
    """Verify two drafts that share a prefix with one 4-D mask, as speculative decoders do."""
    cache, past = make_cache(), 50
    model(prompt(1, past), past_key_values=cache)
    parents = [(), (0,), (0, 1), (0,), (0, 3)]
    allowed = torch.zeros(1, 1, 5, past + 5, dtype=torch.bool)
    allowed[..., :past] = True
    for token, ancestors in enumerate(parents):
        allowed[0, 0, token, [past + i for i in (*ancestors, token)]] = True
    out = model(
        prompt(1, 5, seed=6),
        past_key_values=cache,
        attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
        position_ids=torch.tensor([[past + len(ancestors) for ancestors in parents]]),
    )
    return Outcome([out.logits.argmax(-1)], [out.logits[0]])


_BEAMS = {"num_beams": 3, "eos_token_id": 1}

MODES: dict[str, Mode] = {
    "greedy": Mode(1, _one_call(_plain(1, 64))),
    "greedy_batch": Mode(3, _one_call(_plain(3, 47))),
    "sampling": Mode(2, _one_call(_plain(2, 55), do_sample=True, top_k=20)),
    "sampling_returns": Mode(6, _one_call(_plain(2, 49), do_sample=True, num_return_sequences=3)),
    "beams": Mode(6, _one_call(_plain(2, 45), **_BEAMS)),
    "beam_returns": Mode(6, _one_call(_plain(2, 43), **_BEAMS, num_return_sequences=2)),
    "beam_sampling": Mode(3, _one_call(_plain(1, 58), **_BEAMS, do_sample=True)),
    "beams_padded": Mode(6, _one_call(_padded(31, 46), **_BEAMS)),
    "padded": Mode(3, _one_call(_padded(40, 61, 5))),
    "chunked_prefill": Mode(2, _one_call(_plain(2, 71), prefill_chunk_size=13)),
    "chunked_padded": Mode(2, _one_call(_padded(66, 38), prefill_chunk_size=16)),
    "prompt_lookup": Mode(1, _one_call(_repetitive, prompt_lookup_num_tokens=4, eos_token_id=1)),
    "assisted": Mode(1, assisted),
    "self_assisted": Mode(1, self_assisted),
    "three_turns": Mode(2, three_turns),
    "padded_turns": Mode(2, padded_turns),
    "prefix_forks": Mode(3, prefix_forks),
    "inputs_embeds": Mode(2, inputs_embeds),
    "reset_and_reuse": Mode(2, reset_and_reuse),
    "select_rows": _edited(3, lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), 2),
    # Says Tensor, takes whatever can index; transformers' own tests pass a tuple.
    "select_tuple": _edited(3, lambda cache: cache.batch_select_indices((2, 0)), 2),  # type: ignore[arg-type]
    "repeat_rows": _edited(3, lambda cache: cache.batch_repeat_interleave(2), 6),
    "reorder_rows": _edited(3, lambda cache: cache.reorder_cache(torch.LongTensor([2, 0, 0])), 3),
    "crop": Mode(2, crop_and_continue),
    "pieces": Mode(2, pieces),
    "masked_holes": Mode(2, masked_holes),
    "tree_mask": Mode(1, tree_mask),
}
"""By name, in the order of the columns of the matrix."""
