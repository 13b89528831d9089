"""Synthetic contexts: their shapes, and how queries wander."""

import pytest
import torch

from offload.bench.contexts import Context, ContextKind, make_context
from offload.bench.shapes import find_shape

TINY = find_shape("tiny")
KINDS: tuple[ContextKind, ...] = ("parametric", "gaussian")


def make(kind: ContextKind = "parametric", num_steps: int = 8, **changes: float) -> Context:
    return make_context(TINY, 512, num_steps, kind=kind, dtype=torch.float32, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_context_has_keys_for_all_steps_and_queries_for_every_layer_and_row(
    kind: ContextKind,
) -> None:
    context = make_context(TINY, 512, 6, num_layers=3, batch=2, kind=kind)
    assert context.keys.shape == context.values.shape == (2, 518, 64)
    assert context.queries.shape == (6, 3, 2, 4, 64)
    assert context.keys.dtype == context.queries.dtype == torch.bfloat16
    assert context.num_steps == 6


@pytest.mark.parametrize("kind", KINDS)
def test_context_of_the_same_seed_is_the_same_and_of_another_is_not(kind: ContextKind) -> None:
    assert torch.equal(make(kind).queries, make(kind).queries)
    assert torch.equal(make(kind).keys, make(kind).keys)
    assert not torch.equal(make(kind).keys, make(kind, seed=1).keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_queries_of_successive_steps_have_the_correlation_asked_for(
    kind: ContextKind, correlation: float
) -> None:
    queries = make(kind, num_steps=1500, correlation=correlation).queries[:, 0, 0, 0]
    around = queries - queries.mean(0)
    found = (around[1:] * around[:-1]).sum() / around.square().sum()
    assert float(found) == pytest.approx(correlation, abs=0.08)


def test_query_cosine_grows_with_the_correlation_up_to_one() -> None:
    cosines = [make(num_steps=64, correlation=each).query_cosine for each in (0.0, 0.5, 0.9, 1.0)]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.5
    assert cosines[-1] == pytest.approx(1.0, abs=1e-5)


def test_heads_of_a_context_have_keys_of_their_own_and_are_flat_to_sharp() -> None:
    shape = find_shape("llama-3.1-8b")
    context = make_context(shape, 512, 4, dtype=torch.float32)
    first, fourth = context.keys[0], context.keys[3]
    assert not torch.equal(first, fourth)
    # Both are flat heads: the same up to the order and the signs of their channels.
    torch.testing.assert_close(first.abs().sort(-1).values, fourth.abs().sort(-1).values)
    queries = context.queries[:, 0, 0].view(4, 8, 4, 128)
    logits = torch.einsum("shgd,hkd->shgk", queries, context.keys[:, :512]) / 128**0.5
    flat, medium, sharp = logits.softmax(-1).topk(16).values.sum(-1).mean((0, 2))[:3].tolist()
    assert flat < medium < sharp
