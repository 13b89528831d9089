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

    def num_tokens(self, num_tokens: int) -> int:
        """Return how many tokens are wanted of so many; whole groups of them are read."""
        wanted = self.tokens if isinstance(self.tokens, int) else int(self.tokens * num_tokens)
        return max(1, min(num_tokens, wanted))

    def num_groups(self, num_tokens: int, group_tokens: int) -> int:
        """Return how many groups are read of so many tokens."""
        return -(-self.num_tokens(num_tokens) // group_tokens)
