"""What is left of groups of tokens with known value means, once some of the tokens were read."""

from torch import Tensor

from offload.index.base import Hits


def remaining(
    counts: Tensor, means: Tensor, group_of: Tensor, hits: Hits, have: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Return count and value mean of the tokens of each group that were not read.

    The values that were read are known, so the mean of the others is as exact as that of all.

    Parameters
    ----------
    counts : Tensor, int [num_heads, num_groups]
    means : Tensor, shape (num_heads, num_groups, value_dim), float32
        Of the values of all tokens of a group.
    group_of : Tensor, int64 [num_heads, num_hits]
        Group of each hit.
    hits, have, values
        As for ``KeyIndex.tail``.

    Returns
    -------
    counts : Tensor, float32 [num_heads, num_groups]
    means : Tensor, shape (num_heads, num_groups, value_dim), float32
        Zero where nothing is left.
    """
    read = have & hits.found
    total = counts.float()
    taken = total.new_zeros(total.shape).scatter_add_(1, group_of, read.float())
    gone = means.new_zeros(means.shape).scatter_add_(
        1, group_of.unsqueeze(-1).expand_as(values), values.float() * read.unsqueeze(-1)
    )
    left = total - taken
    rest = (means * total.unsqueeze(-1) - gone) / left.clamp_min(1).unsqueeze(-1)
    return left, rest * (left > 0).unsqueeze(-1)
