"""Keys that lie in runs of one topic each, and queries that look for one and wander to others."""

import numpy as np
import torch
from torch import Tensor


def topic_keys(
    num_heads: int,
    num_tokens: int,
    dim: int,
    *,
    topic_tokens: int = 64,
    noise: float = 0.25,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Return keys [num_heads, num_tokens, dim], and the topics of each head [num_topics, dim].

    Channels have means, and four of them large ones, as in language models. Within a topic keys
    differ by ``noise``, relative to how topics differ.
    """
    rng = np.random.default_rng(seed)
    keys, topics = np.empty((num_heads, num_tokens, dim), np.float32), []
    for head in range(num_heads):
        means = rng.standard_normal(dim)
        means[rng.choice(dim, 4, replace=False)] *= 8
        stops = np.cumsum(rng.geometric(1 / topic_tokens, num_tokens))
        topic = np.searchsorted(stops, np.arange(num_tokens), side="right")
        own = rng.standard_normal((int(topic[-1]) + 1, dim))
        keys[head] = means + own[topic] + noise * rng.standard_normal((num_tokens, dim))
        topics.append(torch.from_numpy(own.astype(np.float32)))
    return torch.from_numpy(keys), topics


def topic_queries(
    topics: list[Tensor],
    num_steps: int,
    group: int,
    *,
    stay: float = 0.9,
    drift: float = 0.25,
    seed: int = 0,
) -> Tensor:
    """Return queries [num_steps, num_heads, group, dim] that look for one topic at a time.

    Parameters
    ----------
    topics
        Of ``topic_keys``.
    num_steps, group
    stay
        Probability that a query looks for the same topic as in the step before.
    drift
        Length of what differs between steps, relative to the topic.
    seed
    """
    rng = np.random.default_rng(seed)
    asked = np.empty((num_steps, len(topics), group, topics[0].shape[1]), np.float32)
    for head, own in enumerate(topics):
        rows = own.numpy()
        for member in range(group):
            topic = rng.integers(0, len(rows))
            for step in range(num_steps):
                if rng.random() > stay:
                    topic = rng.integers(0, len(rows))
                noise = drift * rng.standard_normal(rows.shape[1])
                asked[step, head, member] = rows[topic] + noise
    return torch.from_numpy(asked)


def kept_mass(keys: Tensor, query: Tensor, ids: Tensor) -> Tensor:
    """Return the share of the softmax that the tokens have, [num_heads, num_queries]."""
    logits = query @ keys.float().mT
    places = ids.clamp_min(0).unsqueeze(1).expand(-1, query.shape[1], -1)
    found = logits.gather(2, places).masked_fill((ids < 0).unsqueeze(1), -torch.inf)
    return (found.logsumexp(-1) - logits.logsumexp(-1)).exp()
