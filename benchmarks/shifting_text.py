"""A head of a text that moves on after its prompt, for ``index_drift``.

As ``offload.evals.parametric``, but the topics, the directions in which content is said, and the
cone of the keys turn away from those of the prompt, by a right angle in the end.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

PROMPT, GENERATED, RECENT = 16384, 32768, 4096
DIM, RANK, VOCABULARY, NUM_TOPICS, TOPIC_TOKENS = 128, 24, 4000, 64, 256
NUM_QUERIES = 32

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.zeros_like,
    "gradual": lambda progress: progress * (math.pi / 2),
    "steps": lambda progress: (progress * 4).ceil() * (math.pi / 8),
}
"""From the progress of generation, 0 to 1, to the angle that all has turned by."""


class Text:
    """Keys and values of a head, and queries for what it said.

    Attributes
    ----------
    keys, values : Tensor, shape (PROMPT + GENERATED, DIM), bfloat16
    """

    def __init__(self, shift: str, temperature: float, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._temperature = temperature
        num_keys = PROMPT + GENERATED
        places = torch.arange(num_keys)
        progress = (places + 1 - PROMPT).clamp_min(0) / GENERATED
        self._angle = SHIFTS[shift](progress).unsqueeze(1)
        self._bases = [torch.linalg.qr(self._normal(DIM, RANK))[0].T for _ in range(2)]
        self._content = self._say(places)
        cones = [3 * normalize(self._normal(DIM), dim=0) for _ in range(2)]
        self._query_cone = 3 * normalize(self._normal(DIM), dim=0) - 0.4 * cones[0]
        self._weight = 0.4 + _slow()
        rows = math.sqrt(DIM) * 0.35 * self._weight * self._aligned(self._content, places)
        rows = rows + self._turned(cones[0], cones[1], places) + 0.15 * self._normal(num_keys, DIM)
        self.keys = _rotate(rows, places).bfloat16()
        values = self._content @ self._normal(RANK, DIM) + 0.5 * self._normal(num_keys, DIM)
        self.values = values.bfloat16()

    def ask(self, num_keys: int, generator: torch.Generator) -> Tensor:
        """Return scaled queries that follow so many keys, ``[NUM_QUERIES, DIM]``."""
        depth = torch.rand(NUM_QUERIES, generator=generator)
        reach = torch.where(torch.arange(NUM_QUERIES) % 2 == 0, num_keys, RECENT)
        target = num_keys - 1 - (depth * reach).long()
        vague = 0.7 / math.sqrt(RANK) * torch.randn(NUM_QUERIES, RANK, generator=generator)
        wanted = self._aligned(self._content[target] + vague, target)
        noise = 0.3 * torch.randn(NUM_QUERIES, DIM, generator=generator)
        rows = wanted * self._temperature * self._weight + self._query_cone + noise
        return _rotate(rows, torch.full((NUM_QUERIES,), num_keys)) / math.sqrt(DIM)

    def _say(self, places: Tensor) -> Tensor:
        """Return what each token means: a word, its topic, and something of its own."""
        frequency = 1 / torch.arange(1, VOCABULARY + 1)
        word = torch.multinomial(
            frequency, len(places), replacement=True, generator=self._generator
        )
        num_runs = len(places) // TOPIC_TOKENS + 1
        topic = torch.randint(0, NUM_TOPICS, (num_runs,), generator=self._generator)
        topic = topic.repeat_interleave(TOPIC_TOKENS)[: len(places)]
        first, second = self._normal(NUM_TOPICS, RANK), self._normal(NUM_TOPICS, RANK)
        about = self._turned(first[topic], second[topic], places)
        words, own = self._normal(VOCABULARY, RANK)[word], self._normal(len(places), RANK)
        return normalize(0.8 * words + 0.6 * about + 0.3 * own, dim=1)

    def _aligned(self, content: Tensor, places: Tensor) -> Tensor:
        """Return content in the directions of its moment."""
        return self._turned(content @ self._bases[0], content @ self._bases[1], places)

    def _turned(self, first: Tensor, second: Tensor, places: Tensor) -> Tensor:
        angle = self._angle[places]
        return angle.cos() * first + angle.sin() * second

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)


def _slow() -> Tensor:
    """Return one for the rotary dimensions that turn slowly, zero for the others."""
    half = torch.arange(DIM // 2) >= DIM // 4
    return torch.cat([half, half]).float()


def _rotate(rows: Tensor, places: Tensor) -> Tensor:
    """Apply the rotary embedding, in halves."""
    angle = places.unsqueeze(1) * 5e5 ** (-torch.arange(0, DIM, 2) / DIM)
    left, right = rows.chunk(2, 1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], 1)
