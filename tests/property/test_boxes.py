"""Whatever the keys, no logit leaves the bounds of its box, exact or in 8 bits, at any level."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.index.boxes import BLOCK_LEAVES, Leaves, encode
from offload.kernels.boxes import BoxTree, bounds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def runs_of_keys(draw: st.DrawFn) -> list[Tensor]:
    """Draw keys of one to three runs, whose channels differ in scale and mean."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    dim, heads = draw(st.integers(1, 20)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    spread = draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0]))
    means = draw(st.sampled_from([0.0, 1.0, 1000.0])) * torch.randn(dim, generator=rng)
    scales = torch.randn(dim, generator=rng).exp() * spread
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=3))
    return [(means + scales * torch.randn(heads, n, dim, generator=rng)).to(dtype) for n in lengths]


def tokens_of(tree: BoxTree, level: int) -> Tensor:
    """Return the number within its level of the node that each token is in."""
    counts = tree.counts[tree.starts[level] : tree.starts[level + 1]].long()
    return torch.arange(len(counts)).repeat_interleave(counts)


@given(
    runs=runs_of_keys(),
    leaf_tokens=st.sampled_from([1, 2, 8]),
    fanout=st.integers(2, 4),
    coded=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_logits_lie_between_the_bounds_of_their_nodes_at_every_level(
    runs: list[Tensor], leaf_tokens: int, fanout: int, coded: bool, seed: int
) -> None:
    keys = torch.cat(runs, 1)
    leaves = Leaves.join([Leaves.build(run, leaf_tokens, coded=coded) for run in runs])
    tree = leaves.tree(fanout, 3)
    query = torch.randn(len(keys), 3, keys.shape[2], generator=torch.Generator().manual_seed(seed))
    logits = query @ keys.float().mT
    # What summing products in another order may come to.
    slip = 1e-5 * (query.abs() @ keys.float().abs().mT).amax() + 1e-30
    for number, level in enumerate(tree.levels):
        own = tokens_of(tree, number)
        assert len(own) == keys.shape[1]
        upper, lower = bounds(level, query)
        assert bool((logits <= upper[:, :, own] + slip).all())
        assert bool((logits >= lower[:, :, own] - slip).all())


@given(runs=runs_of_keys(), leaf_tokens=st.sampled_from([1, 2, 8]), coded=st.booleans())
def test_boxes_of_every_level_hold_their_keys_exactly(
    runs: list[Tensor], leaf_tokens: int, coded: bool
) -> None:
    keys = torch.cat(runs, 1).float()
    leaves = Leaves.join([Leaves.build(run, leaf_tokens, coded=coded) for run in runs])
    tree = leaves.tree(2, 3)
    for number, level in enumerate(tree.levels):
        lower, upper = (rows[:, tokens_of(tree, number)] for rows in level.decoded())
        assert bool((lower <= keys).all())
        assert bool((keys <= upper).all())


@given(runs=runs_of_keys(), leaf_tokens=st.sampled_from([1, 8]), coded=st.booleans())
def test_prefixes_of_joined_runs_are_the_joins_of_the_first_ones(
    runs: list[Tensor], leaf_tokens: int, coded: bool
) -> None:
    parts = [Leaves.build(run, leaf_tokens, coded=coded) for run in runs]
    for count in range(1, len(parts) + 1):
        first = Leaves.join(parts[:count])
        cut = Leaves.join(parts).prefix(sum(run.shape[1] for run in runs[:count]))
        assert cut.cuts == first.cuts
        for name in ("lower", "upper", "scale", "offset"):
            assert torch.equal(getattr(cut, name), getattr(first, name)), name


@given(
    num_nodes=st.integers(1, 2 * BLOCK_LEAVES + 3),
    width=st.sampled_from([0.0, 1e-3, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def test_codes_are_off_by_less_than_two_steps_of_their_block(
    num_nodes: int, width: float, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    lower = torch.randn(2, num_nodes, 5, generator=rng)
    upper = lower + width * torch.rand(2, num_nodes, 5, generator=rng)
    low, high, scale, offset = encode(lower, upper)
    block = torch.arange(num_nodes) // BLOCK_LEAVES
    step, first = scale[:, block], offset[:, block]
    assert bool((lower - (first + step * low) <= 2 * step).all())
    assert bool((first + step * high - upper <= 2 * step).all())
    assert bool((scale >= 0).all())
