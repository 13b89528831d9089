"""Keeps every layer to its share of a tier, whatever policy chooses within a layer."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from offload.tiers.eviction import Ranking
from offload.types import ChunkId


class ByLayer:
    """One policy for each layer; victims come from the layers that hold most beyond their share.

    Not thread-safe. ``victims`` takes, besides what the policies take, a time proportional to the
    number of layers for each victim.

    Parameters
    ----------
    make_policy : callable
        Makes the policy of one layer.
    layer_of : callable
        Names the layer of every chunk that is inserted or observed.
    shares : sequence of float, optional
        See ``set_shares``. By default all layers have equal ones.
    """

    def __init__(
        self,
        make_policy: Callable[[], Ranking],
        layer_of: Callable[[ChunkId], int],
        shares: Sequence[float] | None = None,
    ) -> None:
        self._make_policy = make_policy
        self._layer_of = layer_of
        self._shares = shares
        self._policies: dict[int, Ranking] = {}
        self._layers: dict[ChunkId, int] = {}
        self._counts: Counter[int] = Counter()

    def set_shares(self, shares: Sequence[float]) -> None:
        """Divide the tier anew; nothing leaves before there is need of room.

        Parameters
        ----------
        shares : sequence of float
            By layer, see ``layer_shares``. A layer beyond the last has none.
        """
        self._shares = shares

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        if chunk not in self._layers:
            layer = self._layers[chunk] = self._layer_of(chunk)
            self._counts[layer] += 1
            self._policy(layer).insert(chunk)

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note that chunks were read."""
        by_layer: dict[int, list[ChunkId]] = {}
        for chunk in chunks:
            if chunk in self._layers:
                by_layer.setdefault(self._layers[chunk], []).append(chunk)
        for layer, part in by_layer.items():
            self._policy(layer).touch(part)

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Note how much attention chunks got in one step, layer by layer."""
        by_layer: dict[int, dict[ChunkId, float]] = {layer: {} for layer in self._policies}
        for chunk, mass in masses.items():
            by_layer.setdefault(self._layer_of(chunk), {})[chunk] = mass
        for layer, part in by_layer.items():
            self._policy(layer).observe(part)

    def remove(self, chunk: ChunkId) -> None:
        """Forget a chunk that left."""
        layer = self._layers.pop(chunk, None)
        if layer is not None:
            self._counts[layer] -= 1
            self._policy(layer).remove(chunk)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks to move out, first to go first."""
        counts = {layer: count for layer, count in self._counts.items() if count}
        shares = {layer: self._share(layer) for layer in counts}
        offers: dict[int, list[ChunkId]] = {}
        found: list[ChunkId] = []
        while shares and len(found) < n:
            num_left = len(self._layers) - len(found) - 1
            layer = max(shares, key=lambda each: counts[each] - shares[each] * num_left)
            if layer not in offers:
                offers[layer] = self._policy(layer).victims(n, exclude)[::-1]
            if offers[layer]:
                found.append(offers[layer].pop())
                counts[layer] -= 1
            else:
                del shares[layer]
        return found

    def worth(self, chunk: ChunkId) -> float:
        """Return what a chunk is worth to the policy of its layer; see ``Ranking``."""
        return self._policy(self._layer_of(chunk)).worth(chunk)

    def _policy(self, layer: int) -> Ranking:
        if layer not in self._policies:
            self._policies[layer] = self._make_policy()
        return self._policies[layer]

    def _share(self, layer: int) -> float:
        if self._shares is None:
            return 1 / len(self._policies)
        return self._shares[layer] if layer < len(self._shares) else 0.0
