"""Attention of every preset with everything read, against torch's own."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from offload.core import CacheCore
from offload.exact import AttentionCall
from offload.presets import PRESETS, customised
from offload.settings import check_settings

SIZE, PROMPT = 16, 1500
HEADS, KV_HEADS, DIM = 8, 2, 64


def random_rows(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.fixture(params=list(PRESETS))
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CacheCore]:
    policy = PRESETS[request.param]
    if policy.near is not None:
        policy = customised(policy, budget=1.0)
    if policy.sparse is not None:
        policy = customised(policy, budget=1.0, sink_tokens=4, window_tokens=64, dense_layers=0)
    capacity = {"gpu": "1MiB", "cpu": "1MiB", "disk": "64MiB"}
    core = CacheCore(check_settings(["gpu", "cpu", "disk"], policy, capacity, tmp_path, SIZE))
    yield core
    core.close()


@pytest.mark.leaks
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_attention_with_everything_read_equals_that_of_torch(
    core: CacheCore, dtype: torch.dtype, most: float
) -> None:
    total, asked = PROMPT + 20, 20
    keys = random_rows(2, KV_HEADS, total, DIM, seed=1, dtype=dtype)
    values = random_rows(2, KV_HEADS, total, DIM, seed=2, dtype=dtype)
    queries = random_rows(2, HEADS, total, DIM, seed=3, dtype=dtype)
    scale = 1 / math.sqrt(DIM)
    found = []
    for start, stop in [(0, PROMPT), (PROMPT, PROMPT + 3), (PROMPT + 3, total)]:
        appended = core.append(0, keys[:, :, start:stop], values[:, :, start:stop])
        call = AttentionCall(queries[:, :, start:stop], scale)
        found.append(core.attend(0, call, appended).float())
    visible = torch.ones(asked, total, dtype=torch.bool).tril(total - asked)
    expected = scaled_dot_product_attention(
        queries[:, :, -asked:].float(),
        keys.float(),
        values.float(),
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
    ).transpose(1, 2)
    # The output is rounded to the dtype of the queries, so is what it is compared with.
    difference = torch.cat(found[1:], 1) - expected.to(dtype).float()
    stats = core.stats()
    assert stats is not None
    name = core.config.preset.name
    if name != "instinfer":  # which counts what only the disk holds
        assert (stats.retrieved_tokens > 0) == (name not in ("exact", "streaming"))
    assert difference.abs().max() <= most
