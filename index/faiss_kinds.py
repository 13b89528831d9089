"""The kinds of FAISS index that we build over the keys of one head, and how they are searched.

All rank by inner product. An inverted file assigns keys by L2 distance and ranks its lists by the
inner product with their centroids: assigned by inner product, all keys would go to the few longest
centroids.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import ConfigError
from offload.index.faiss_bridge import faiss_module, from_bytes, to_bytes

KINDS = ("ivf", "ivf_rabitq", "pq", "hnsw")

_SEED = 1234
_ITERATIONS = 10
_SAMPLES_PER_CENTROID = 256

_PQ_CENTROIDS = 16
_PQ_DIMS = 4
"""Dimensions that share a code of four bits: 16 bytes per key of 128 dimensions."""

_EF_CONSTRUCTION = 100


@dataclass(frozen=True, slots=True)
class AnnSettings:
    """How keys are indexed and searched.

    Attributes
    ----------
    kind : {"ivf", "ivf_rabitq", "pq", "hnsw"}
        Inverted file of keys; of one-bit codes (RaBitQ) of what keys differ from their centroid;
        product quantisation with four-bit codes, all scanned; small-world graph.
    tokens_per_list : int
        Of an inverted file, on average.
    scan : float
        Share of its lists that a search reads; more if they hold less than twice the budget.
    degree : int
        Edges from a key of the graph above its ground level, where there are twice as many.
    beam : int
        Keys that a search of the graph remembers (``efSearch``), or the budget if that is more.
    segment_tokens : int
        Keys that are indexed together; a longer run is cut.
    """

    kind: str = "ivf"
    tokens_per_list: int = 64
    scan: float = 0.08
    degree: int = 32
    beam: int = 160
    segment_tokens: int = 131072

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"unknown kind of index {self.kind!r}; known: {', '.join(KINDS)}")
        for name in ("tokens_per_list", "degree", "beam", "segment_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it is at least one")
        if not 0 < self.scan <= 1:
            raise ConfigError(f"scan={self.scan}; it is a share above 0 and at most 1")


class Nearest(NamedTuple):
    """What a search found.

    Attributes
    ----------
    scores : array, float32 [num_queries, k]
        Inner products, exact or estimated from codes; ``-inf`` where there are fewer.
    ids : array, int64 [num_queries, k]
        ``-1`` where there are fewer.
    scanned_bytes : int
        For all queries.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int64]
    scanned_bytes: int


class HeadIndex:
    """A FAISS index over the keys of one head. Searching does not change it.

    Parameters
    ----------
    index
        Of FAISS.

    Attributes
    ----------
    num_bytes : int
        When serialised.
    """

    def __init__(self, index: Any) -> None:
        self.num_bytes = len(to_bytes(index))
        self._index = index
        self._degree = _mean_degree(index) if hasattr(index, "hnsw") else 0.0

    def to_bytes(self) -> Tensor:
        """Return what ``from_bytes`` of the bridge turns into the FAISS index again."""
        return to_bytes(self._index)

    def search(self, query: NDArray[np.float32], k: int, settings: AnnSettings) -> Nearest:
        """Return the keys with the largest inner products.

        Parameters
        ----------
        query : array, float32 [num_queries, key_dim]
        k : int
            Positive, and no more than there are keys.
        settings : AnnSettings
            Of the kind that was built; ``scan`` and ``beam`` may differ from one search to another.
        """
        if settings.kind == "hnsw":
            return self._search_graph(query, k, max(settings.beam, k))
        if settings.kind == "pq":
            return self._search_codes(query, k)
        share = max(settings.scan, min(1.0, 2 * k / self._index.ntotal))
        return self._search_lists(query, k, math.ceil(share * self._index.nlist))

    def _search_codes(self, query: NDArray[np.float32], k: int) -> Nearest:
        index = self._index
        scores, ids = index.search(query, k)
        # FastScan returns nothing if all codes score the same; then any keys are the best.
        tied = ids[:, 0] < 0
        ids[tied] = np.arange(k)
        scores[tied] = (query[tied] @ index.reconstruct(0))[:, None]
        return Nearest(scores, ids, len(query) * index.ntotal * index.code_size)

    def _search_graph(self, query: NDArray[np.float32], k: int, beam: int) -> Nearest:
        parameters = faiss_module().SearchParametersHNSW(efSearch=beam)
        scores, ids = self._index.search(query, k, params=parameters)
        # FAISS adds up what it compares for the whole process only. This is all edges of the keys
        # that the beam can hold: an upper estimate, as many of them lead to keys already seen.
        compared = min(self._index.ntotal, int(beam * self._degree))
        return Nearest(scores, ids, len(query) * compared * (_bytes(query) + 4))

    def _search_lists(self, query: NDArray[np.float32], k: int, probes: int) -> Nearest:
        index = self._index
        parameters = faiss_module().SearchParametersIVF(nprobe=probes)
        scores, ids = index.search(query, k, params=parameters)
        # The search does not say which lists it read, so they are looked up once more.
        lists = index.quantizer.search(query, probes)[1]
        inside = sum(index.invlists.list_size(int(number)) for number in lists.flat)
        read = len(query) * index.nlist * _bytes(query) + inside * index.code_size
        return Nearest(scores, ids, read)


def _bytes(query: NDArray[np.float32]) -> int:
    """Return the bytes of one key as FAISS holds it."""
    return int(query.shape[1] * query.itemsize)


def build_head(keys: NDArray[np.float32], settings: AnnSettings) -> HeadIndex:
    """Index keys ``[num_keys, key_dim]``, on a thread where FAISS may use one.

    Keys that are too few to train codes of, or of a width that codes do not divide, are kept as
    they are.
    """
    return HeadIndex(_build(keys, settings))


def _build(keys: NDArray[np.float32], settings: AnnSettings) -> Any:
    faiss = faiss_module()
    num_keys, dim = keys.shape
    if settings.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, settings.degree, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EF_CONSTRUCTION
    elif settings.kind != "pq":
        return _build_inverted(keys, settings)
    elif num_keys >= _PQ_CENTROIDS and dim % _PQ_DIMS == 0:
        index = faiss.IndexPQFastScan(dim, dim // _PQ_DIMS, 4, faiss.METRIC_INNER_PRODUCT)
        _set_training(index.pq.cp)
        index.train(keys)
    else:
        index = faiss.IndexFlatIP(dim)
    index.add(keys)
    return index


def _build_inverted(keys: NDArray[np.float32], settings: AnnSettings) -> Any:
    faiss = faiss_module()
    num_keys, dim = keys.shape
    kmeans = faiss.Kmeans(dim, max(1, num_keys // settings.tokens_per_list), niter=_ITERATIONS)
    _set_training(kmeans.cp)
    kmeans.train(keys)
    nearest = kmeans.assign(keys)[1]
    # An empty list would cost a comparison, and a probe that could have gone to another.
    centroids = np.ascontiguousarray(kmeans.centroids[np.unique(nearest)])
    by_distance, by_product = faiss.IndexFlatL2(dim), faiss.IndexFlatIP(dim)
    by_distance.add(centroids)
    by_product.add(centroids)
    is_coded = settings.kind == "ivf_rabitq"
    make = faiss.IndexIVFRaBitQFastScan if is_coded else faiss.IndexIVFFlat
    index = make(by_distance, dim, len(centroids), faiss.METRIC_INNER_PRODUCT)
    index.train(keys)
    index.add(keys)
    index.quantizer = by_product
    # The quantizers belong to Python here; what is read back owns its own.
    return from_bytes(to_bytes(index))


def _set_training(parameters: Any) -> None:
    parameters.seed = _SEED
    parameters.min_points_per_centroid = 1
    parameters.max_points_per_centroid = _SAMPLES_PER_CENTROID


def _mean_degree(index: Any) -> float:
    """Return how many edges a key has on the ground level of an HNSW index, on average."""
    hnsw, to_array = index.hnsw, faiss_module().vector_to_array
    starts = to_array(hnsw.offsets)[: index.ntotal].astype(np.int64)
    places = starts[:, None] + np.arange(hnsw.nb_neighbors(0))
    return float((to_array(hnsw.neighbors)[places] >= 0).sum(1).mean())
