"""One step over several caches is the same as one step over each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload import OffloadedCache
from offload.daemon.work import step_attention
from offload.daemon.work.residency import demote_from_device
from offload.daemon.work.step_attention import StepAttention
from offload.daemon.work.step_cache import RowFailed, StepCache, can_share
from offload.errors import CapacityError
from offload.kernels.dispatch import compiled
from offload.sessions.store import SessionStore
from tests.support.models import make_model

LENGTHS = [1, 7, 8, 9, 40]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[OffloadedCache]:
    capacity = {"gpu": "2MiB", "cpu": "2MiB", "disk": "8MiB"}
    with OffloadedCache(
        ["gpu", "cpu", "disk"], capacity=capacity, disk_path=tmp_path, chunk_tokens=8
    ) as cache:
        cache.bind(make_model("qwen3").config)
        yield cache


def filled(root: OffloadedCache, length: int, name: str = "qwen3") -> OffloadedCache:
    cache = root.fork()
    run(name, torch.arange(length)[None] * 7 % 90, cache)
    return cache


@torch.no_grad()
def run(name: str, ids: Tensor, cache: Any, **arguments: Any) -> Tensor:
    model: Any = make_model(name)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, **arguments).logits
    return logits[:, -1]


def step(caches: list[OffloadedCache], ids: Tensor, together: StepAttention) -> Tensor:
    cache = StepCache(caches, together)
    try:
        return run("qwen3", ids, cache, position_ids=cache.position_ids)
    except RowFailed:
        cache.undo()
        raise


@pytest.mark.parametrize("has_kernel", [True, False])
def test_rows_of_any_length_get_their_own_logits(
    root: OffloadedCache, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(step_attention, "compiled", lambda name: None)
    caches = [filled(root, length) for length in LENGTHS]
    alone = [cache.fork() for cache in caches]
    together = StepAttention()

    for turn in range(10):  # every row seals a chunk on the way
        ids = torch.arange(len(caches))[:, None] + 5 * turn + 3
        logits = step(caches, ids, together)
        expected = torch.cat([run("qwen3", ids[i : i + 1], each) for i, each in enumerate(alone)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert [cache.get_seq_length() for cache in caches] == [length + 10 for length in LENGTHS]
    for cache in [*caches, *alone]:
        cache.close()


@pytest.mark.parametrize("moves", [False, True])
def test_row_that_fills_a_chunk_is_attended_together_with_the_others(
    root: OffloadedCache, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled("cpu_rows") is None:
        pytest.skip("without numba there is no kernel for rows of different lengths")
    caches = [filled(root, length) for length in (8, 40, 21)]
    alone = [cache.fork() for cache in caches]
    together, attended = StepAttention(), []
    attend = together.attend

    def noting(call: Any, rows: Any) -> Tensor | None:
        attended.append(attend(call, rows))
        return attended[-1]

    monkeypatch.setattr(together, "attend", noting)
    for turn in range(4):
        if moves and turn == 2:
            demote_from_device(caches[1])
        ids = torch.tensor([[3], [4], [5]]) + turn
        logits = step(caches, ids, together)
        expected = torch.cat([run("qwen3", ids[i : i + 1], each) for i, each in enumerate(alone)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    assert len(attended) == 4 * len(caches[0].layers)
    assert not any(each is None for each in attended)
    assert (caches[1].stats().demoted_chunks > 0) == moves
    for cache in [*caches, *alone]:
        cache.close()


def test_chunks_on_the_disk_are_attended_row_by_row(tmp_path: Path) -> None:
    capacity = {"gpu": "320KiB", "cpu": "64KiB", "disk": "8MiB"}
    with OffloadedCache(
        ["gpu", "cpu", "disk"], capacity=capacity, disk_path=tmp_path, chunk_tokens=8
    ) as root:
        root.bind(make_model("qwen3").config)
        caches = [filled(root, 150), filled(root, 90)]
        alone = [cache.fork() for cache in caches]
        assert caches[0].stats().tiers["disk"].num_chunks > 0
        ids = torch.tensor([[5], [6]])

        logits = step(caches, ids, StepAttention())

        expected = torch.cat([run("qwen3", ids[i : i + 1], each) for i, each in enumerate(alone)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for cache in [*caches, *alone]:
            cache.close()


def test_step_that_fails_for_one_row_leaves_all_as_they_were(
    root: OffloadedCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [filled(root, length) for length in LENGTHS]
    before = [cache.fork() for cache in caches]
    append = type(caches[0]._core).append

    def failing(core: Any, layer: int, keys: Tensor, values: Tensor) -> Any:
        if core is caches[2]._core and layer == 1:
            raise CapacityError("full")
        return append(core, layer, keys, values)

    ids = torch.full((len(caches), 1), 4)
    monkeypatch.setattr(type(caches[0]._core), "append", failing)
    with pytest.raises(RowFailed) as failure:
        step(caches, ids, StepAttention())
    monkeypatch.undo()

    assert failure.value.row == 2
    assert isinstance(failure.value.__cause__, CapacityError)
    assert [cache.get_seq_length() for cache in caches] == LENGTHS
    # One layer has sealed its full tail, and the others have not: a save has to cope.
    ids_of = torch.arange(LENGTHS[2])[None] * 7 % 90
    with SessionStore(tmp_path / "store", min_free=0) as store:
        info = caches[2].save("full", store=store, model=make_model("qwen3"), token_ids=ids_of)
        assert info.num_tokens == LENGTHS[2]
    logits = step(caches, ids, StepAttention())
    expected = step(before, ids, StepAttention())
    torch.testing.assert_close(logits, expected)
    for cache in [*caches, *before]:
        cache.close()


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", True), ("gemma3", False), ("deepseek_v3", False)]
)
def test_models_with_other_layers_take_no_part(name: str, expected: bool, tmp_path: Path) -> None:
    with OffloadedCache(["gpu", "cpu"], capacity={"gpu": "4MiB", "cpu": "1MiB"}) as cache:
        cache.bind(make_model(name).config)

        assert can_share(cache) is expected
