"""How much SparF reads."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SparF:
    """How much SparF reads.

    Attributes
    ----------
    channels : int
        Of each KV head, to find the groups by (r).
    tokens : float or int
        To attend exactly (k): a share of those asked for, or a number; whole groups.
    group_tokens : int
        Tokens that are chosen and read together.
    """

    channels: int
    tokens: float | int
    group_tokens: int = 16

    def num_groups(self, num_tokens: int, group_tokens: int) -> int:
        """Return how many groups are read of so many tokens."""
        wanted = self.tokens if isinstance(self.tokens, int) else self.tokens * num_tokens
        return max(1, -(-int(wanted) // group_tokens))
