"""What only a CUDA device can show: its kernels, its memory, its streams."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from offload import OffloadedCache
from offload.kernels import dispatch, reference
from offload.loader import StagingLoader
from offload.prefetch.plan import LoadGroup
from offload.prefetch.stream import ChunkStream
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import grid_view, page_aligned
from offload.types import ChunkId, ChunkLayout
from tests.support.disk import WAIT_S, make_disk_tier

pytestmark = pytest.mark.gpu

LAYOUT = ChunkLayout(2, 16, 64, 64, torch.float32)
SLOT_BYTES = 4096
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Keep float32 products in float32, so that tokens can be compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_queries", "offset"), [(1, None), (5, 100), (64, 0), (64, 30)])
@pytest.mark.parametrize("group", [1, 4])
def test_kernel_on_the_device_gives_the_answer_of_the_reference_on_the_cpu(
    device: torch.device, dtype: torch.dtype, num_queries: int, offset: int | None, group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * group, num_queries, 64, generator=generator).to(dtype)
    keys, values = (torch.randn(2, 4, 2, 16, 64, generator=generator).to(dtype) for _ in range(2))
    on_device = [x.to(device) for x in (query, keys, values)]
    found = dispatch.partial_attention(*on_device, scale=0.125, offset=offset)
    expected = reference.partial_attention(
        query.double(), keys.double(), values.double(), scale=0.125, offset=offset
    )
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.out.cpu().double(), expected.out, rtol=limit, atol=limit)
    torch.testing.assert_close(found.lse.cpu().double(), expected.lse, rtol=limit, atol=limit)


def make_llama(device: torch.device) -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(device)


def generate(model: Any, cache: Cache, ids: Tensor, **options: int) -> Tensor:
    tokens: Tensor = model.generate(
        ids, past_key_values=cache, max_new_tokens=24, do_sample=False, **options
    )
    return tokens


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("prompt_tokens", [30, 200])
def test_generate_through_three_tiers_gives_the_tokens_of_dynamic_cache(
    device: torch.device, tmp_path: Path, prompt_tokens: int, num_beams: int
) -> None:
    model = make_llama(device)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, prompt_tokens), generator=generator).to(device)
    expected = generate(model, DynamicCache(), ids, num_beams=num_beams)
    capacity = {"gpu": 60 * SLOT_BYTES, "cpu": 40 * SLOT_BYTES, "disk": 4 * MIB}
    tiers = ["gpu", "cpu", "disk"]
    with OffloadedCache(tiers, capacity=capacity, disk_path=tmp_path, chunk_tokens=8) as cache:
        assert torch.equal(generate(model, cache, ids, num_beams=num_beams), expected)
        cache.check_integrity()
        stored = {name: tier.stored_bytes for name, tier in cache.stats().tiers.items()}
    assert prompt_tokens < 100 or all(stored.values())


def make_store(
    device: torch.device,
    directory: Path,
    num_slots: int,
    policy: type[EvictionPolicy] = LeastRecentlyUsed,
) -> ChunkStore:
    """Return a store over three tiers of so many slots, the host one page-locked."""
    size = num_slots * LAYOUT.slot_bytes
    host = torch.device("cpu")
    tiers = [
        MemoryTier("gpu", capacity_bytes=size, layout=LAYOUT, device=device),
        MemoryTier("cpu", capacity_bytes=size, layout=LAYOUT, device=host, pinned=True),
        make_disk_tier(directory, 64, LAYOUT),
    ]
    buffers = page_aligned(4 * LAYOUT.slot_bytes).view(4, -1)
    return ChunkStore(tiers, [policy() for _ in tiers], LAYOUT, list(buffers), Counters(), WAIT_S)


def test_host_tier_beside_a_device_is_really_page_locked(device: torch.device) -> None:
    host = torch.device("cpu")
    tier = MemoryTier(
        "cpu", capacity_bytes=4 * LAYOUT.slot_bytes, layout=LAYOUT, device=host, pinned=True
    )
    [slot] = tier.allocate(1)
    buffer = tier.buffer(slot)
    assert buffer.is_pinned()
    tier.close()
    assert not buffer.is_pinned()


def test_device_memory_of_a_cache_stays_within_its_capacity(
    device: torch.device, tmp_path: Path
) -> None:
    model, capacity = make_llama(device), 4 * MIB
    ids = torch.randint(3, 64, (1, 3000), device=device)
    sizes = {"gpu": capacity, "cpu": 4 * MIB, "disk": 64 * MIB}

    def peak_bytes(cache: Cache) -> int:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for piece in ids.split(256, 1):
                model(piece, past_key_values=cache, logits_to_keep=1)
        return torch.cuda.max_memory_allocated() - before

    peak_bytes_of_one_piece(model, ids[:, :256])  # warm up: libraries keep workspaces of their own
    workspace = peak_bytes_of_one_piece(model, ids[:, :256])
    with OffloadedCache(["gpu", "cpu", "disk"], capacity=sizes, disk_path=tmp_path) as cache:
        used = peak_bytes(cache)
        assert cache.stats().tiers["gpu"].peak_bytes <= capacity
    # Scores of 256 queries over one staged group, and its keys in float32, come on top.
    allowed = capacity + workspace + 16 * MIB
    assert used <= allowed


def peak_bytes_of_one_piece(model: Any, ids: Tensor) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(ids, logits_to_keep=1)
    return torch.cuda.max_memory_allocated() - before


def keep_busy(device: torch.device) -> None:
    """Queue a few milliseconds of work on the current stream."""
    x = torch.randn(2048, 2048, device=device)
    for _ in range(8):
        x = x @ x * 1e-3


def put_constant(store: ChunkStore, value: float, n: int) -> list[ChunkId]:
    """Put ``n`` chunks whose elements all have one value, still being computed when stored."""
    keep_busy(store.tiers[0].pool.slab.device)  # type: ignore[attr-defined]
    shape = (1, 2, n * LAYOUT.chunk_tokens, 64)
    content = torch.full(shape, value, device="cuda")
    return [chunk for [chunk] in store.put(0, 0, content, content)]


def test_load_while_compute_is_busy_never_gives_stale_data(
    device: torch.device, tmp_path: Path
) -> None:
    store = make_store(device, tmp_path / "disk", num_slots=4)
    loader = StagingLoader(store, 2, 2, device)
    with contextlib.closing(store), contextlib.closing(loader):
        stream = ChunkStream(loader, 2, store.counters, WAIT_S)
        for step in range(200):
            chunks = put_constant(store, float(step), 10)
            groups = [LoadGroup(i, 2, (chunks[i], chunks[i + 1])) for i in range(0, len(chunks), 2)]
            seen = []
            for _, buffer in stream.read(groups, []):
                keep_busy(device)
                rows = grid_view(loader.buffers[buffer], 0, (1, 1), (1, 2), LAYOUT)
                seen.append(torch.stack([rows.amin(), rows.amax()]))
            assert torch.stack(seen).eq(step).all(), f"stale data in step {step}"
            store.release(chunks)
        stream.drain()
        store.drain()
        store.check_integrity()


def test_chunks_read_back_on_the_host_are_complete(device: torch.device, tmp_path: Path) -> None:
    store = make_store(device, tmp_path / "disk", num_slots=3)
    with contextlib.closing(store):
        for step in range(50):
            chunks = put_constant(store, float(step), 9)
            for chunk in chunks:
                assert (store.read_chunk(chunk) == step).all()
            store.release(chunks)


def test_chunk_promoted_from_its_write_buffer_is_that_chunk(
    device: torch.device, tmp_path: Path
) -> None:
    store = make_store(device, tmp_path / "disk", num_slots=2, policy=KeepFirst)
    loader = StagingLoader(store, 2, 1, device)
    with contextlib.closing(store), contextlib.closing(loader):
        resident = put_constant(store, 1.0, 4)
        [pending] = put_constant(store, 2.0, 1)
        group = LoadGroup(0, 1, (pending,))
        loading = loader.start(group, 0)
        store.drain()
        store.release(resident[2:])  # room in the host tier
        loading.wait(WAIT_S)
        loader.release(group, 0, used=True)
        torch.cuda.synchronize()
        assert store.level_of(pending) == 1
        assert (store.read_chunk(pending) == 2).all()
