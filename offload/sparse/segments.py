"""How a run of chunks is cut into segments that are indexed on their own. Pure."""

from dataclasses import dataclass
from itertools import pairwise

from offload.errors import ConfigError

Cut = tuple[int, int]
"""Start and stop, in chunks."""


@dataclass(frozen=True, slots=True)
class SegmentSizes:
    """Segments of the first size as long as they fit, then of the next; what is left has no index.

    A segment counts only once there are as many tokens after it as one of the next size has (after
    one of the last size: a chunk). Until then it is built in the background, and what it replaces
    is used. So what is searched depends on the number of chunks alone: neither on whether they came
    at once or one by one, nor on how fast the machine is.

    Attributes
    ----------
    tokens : tuple of int
        Sizes, descending, each a multiple of the next.

    Raises
    ------
    ConfigError
        They are not.
    """

    tokens: tuple[int, ...] = (8192, 1024)

    def __post_init__(self) -> None:
        if not self.tokens or self.tokens[-1] < 1 or any(a % b for a, b in pairwise(self.tokens)):
            raise ConfigError(
                f"sizes of segments {self.tokens} do not descend, each a multiple of the next"
            )

    def cut(self, num_chunks: int, chunk_tokens: int) -> list[Cut]:
        """Return the segments of so many chunks, in order and without gaps."""
        steps = self._steps(chunk_tokens)
        cuts: list[Cut] = []
        start = 0
        for step, lag in zip(steps, [*steps[1:], 1], strict=True):
            while start + step + lag <= num_chunks:
                cuts.append((start, start + step))
                start += step
        return cuts

    def coming(self, num_chunks: int, chunk_tokens: int) -> list[Cut]:
        """Return the segments that are complete, but do not count yet."""
        steps = self._steps(chunk_tokens)
        cuts: list[Cut] = []
        for step, lag in zip(steps, [*steps[1:], 1], strict=True):
            last = num_chunks // step * step
            if last and num_chunks - last < lag:
                cuts.append((last - step, last))
        return cuts

    def largest(self, num_chunks: int, chunk_tokens: int) -> list[Cut]:
        """Return the complete segments of the largest size, whether they count yet or not."""
        step = self._steps(chunk_tokens)[0]
        return [(stop - step, stop) for stop in range(step, num_chunks + 1, step)]

    def _steps(self, chunk_tokens: int) -> list[int]:
        """Return the sizes in chunks; those that a chunk is as large as are one."""
        return list(dict.fromkeys(max(1, tokens // chunk_tokens) for tokens in self.tokens))
