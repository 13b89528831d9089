"""Clusters hold keys of one direction, every key once, and the same keys every time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from offload.index.kmeans import cluster_means, spherical_kmeans


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bundles(num_tokens: int, num_bundles: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys of random lengths around a few directions, and the direction of each."""
    directions = normalize(rows(2, num_bundles, 64, seed=seed), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(num_bundles, (num_tokens,), generator=generator)
    keys = directions[:, number] + rows(2, num_tokens, 64, seed=seed + 1) / 50
    return keys * rows(2, num_tokens, 1, seed=seed + 2).exp(), number


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_every_key_is_in_one_cluster_and_centroids_are_the_means(
    num_tokens: int, num_clusters: int, seed: int
) -> None:
    num_clusters = min(num_clusters, num_tokens)
    keys = rows(2, num_tokens, 8, seed=seed)
    assignment, centroids = spherical_kmeans(keys, num_clusters)
    assert assignment.shape == (2, num_tokens)
    for head in range(2):
        for cluster in range(num_clusters):
            members = keys[head, assignment[head] == cluster]
            expected = members.mean(0) if len(members) else torch.zeros(8)
            torch.testing.assert_close(centroids[head, cluster], expected)
        assert set(assignment[head].tolist()) <= set(range(num_clusters))


@pytest.mark.parametrize("num_tokens", [40, 333])
@pytest.mark.parametrize("num_bundles", [2, 5])
def test_keys_of_different_directions_never_share_a_cluster(
    num_bundles: int, num_tokens: int
) -> None:
    keys, number = bundles(num_tokens, num_bundles)
    assignment = spherical_kmeans(keys, 4 * num_bundles)[0]
    for head in assignment:
        owners = {(int(cluster), int(bundle)) for cluster, bundle in zip(head, number, strict=True)}
        assert len({cluster for cluster, _ in owners}) == len(owners)


def test_long_keys_do_not_attract_keys_of_another_direction() -> None:
    """Scenario: by inner product all keys would go to the longest centroid."""
    number = torch.arange(60) % 2
    long_and_short = torch.tensor([[10.0, 0.0], [0.8, 0.6]])
    assignment = spherical_kmeans(long_and_short[number].unsqueeze(0), 7)[0][0]
    assert not set(assignment[number == 0].tolist()) & set(assignment[number == 1].tolist())


def test_length_of_keys_does_not_change_their_cluster() -> None:
    keys = bundles(200, 5)[0]
    # A power of two, and the same for all, so that rounding does not either.
    assert torch.equal(spherical_kmeans(keys, 10)[0], spherical_kmeans(keys * 1024, 10)[0])


def test_heads_are_clustered_as_if_they_were_alone() -> None:
    keys = rows(3, 300, 64)
    together = spherical_kmeans(keys, 12)[0]
    apart = torch.cat([spherical_kmeans(head, 12)[0] for head in keys.split(1)])
    assert torch.equal(together, apart)


def test_clustering_twice_gives_the_same_clusters() -> None:
    keys = rows(2, 500, 64)
    for one, other in zip(spherical_kmeans(keys, 20), spherical_kmeans(keys, 20), strict=True):
        assert torch.equal(one, other)


def test_equal_keys_share_one_cluster_and_the_others_stay_empty() -> None:
    keys = rows(1, 1, 16).expand(1, 50, 16)
    assignment, centroids = spherical_kmeans(keys, 5)
    assert len(set(assignment[0].tolist())) == 1
    counts = cluster_means(keys, assignment, 5)[1]
    assert sorted(counts[0].tolist()) == [0, 0, 0, 0, 50]
    torch.testing.assert_close(centroids.sum(1), keys[:, 0])


def test_keys_of_zeros_are_clustered_without_nan() -> None:
    assignment, centroids = spherical_kmeans(torch.zeros(1, 20, 8), 4)
    assert torch.equal(centroids, torch.zeros(1, 4, 8))
    assert assignment.shape == (1, 20)


def test_more_rounds_bring_keys_closer_to_their_centroids() -> None:
    keys = normalize(bundles(600, 12, seed=3)[0] + rows(2, 600, 64, seed=9) / 12, dim=-1)

    def closeness(num_iterations: int) -> float:
        assignment, centroids = spherical_kmeans(keys, 12, num_iterations, sample_step=1)
        own = centroids.take_along_dim(assignment.unsqueeze(-1), 1)
        return float(torch.cosine_similarity(keys, own, dim=-1).mean())

    assert closeness(5) >= closeness(1) > closeness(0)


def test_means_of_clusters_count_their_rows() -> None:
    assignment = torch.tensor([[0, 2, 2, 0, 2]])
    means, counts = cluster_means(torch.arange(5.0).view(1, 5, 1), assignment, 4)
    assert means.flatten().tolist() == pytest.approx([1.5, 0.0, 7 / 3, 0.0])
    assert counts.tolist() == [[2, 0, 3, 0]]
