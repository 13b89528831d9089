"""Exams whose documents lie on the disk but for a share of them."""

import random
from pathlib import Path

import pytest
import torch

from offload import OffloadedCache
from offload.cli import main
from offload.evals import exam, records
from offload.evals.contenders import find_contender
from offload.evals.exam import Exam, Examiner
from offload.recall_data import BOS_TOKEN_ID
from offload.recall_model import load_recall_model
from offload.stats import CacheStats

NUM_TOKENS = 1500
CASE = records.TASKS["single_needle"](NUM_TOKENS, 2, random.Random(3))
NUM_LAYERS, CHUNK_BYTES = 4, 2 * 64 * 128 * 4


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[CacheStats]:
    """Statistics of the caches that were closed."""
    seen: list[CacheStats] = []

    class Watched(OffloadedCache):
        def close(self) -> None:
            seen.append(self.stats())
            super().close()

    monkeypatch.setattr(exam, "OffloadedCache", Watched)
    return seen


def ask(policy: str, shares: tuple[float, float] | None, scratch: Path) -> Exam:
    model, tokenizer = load_recall_model(torch.float32)
    examiner = Examiner(model, tokenizer, BOS_TOKEN_ID, disk_path=scratch, shares=shares)
    return examiner.ask(CASE, find_contender(policy, "B"))


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.05, 0.15), (1.0, 0.0)])
def test_capacities_are_the_shares_of_a_document_and_what_a_step_needs_besides(
    shares: tuple[float, float], tmp_path: Path
) -> None:
    model, tokenizer = load_recall_model(torch.float32)
    found = Examiner(model, tokenizer, disk_path=tmp_path, shares=shares)._capacity(NUM_TOKENS)
    assert found is not None
    num_chunks = NUM_LAYERS * 24
    sizes = [found["gpu"], found["cpu"]]
    beside = [(2 * NUM_LAYERS + 16) * CHUNK_BYTES, 16 * CHUNK_BYTES]
    assert sizes == [
        int(share * num_chunks * CHUNK_BYTES) + extra
        for share, extra in zip(shares, beside, strict=True)
    ]
    assert int(found["disk"]) > 2 * num_chunks * CHUNK_BYTES


def test_without_shares_capacities_are_the_cache_s_own_choice(tmp_path: Path) -> None:
    examiner = Examiner(*load_recall_model(torch.float32), disk_path=tmp_path)
    assert examiner._capacity(NUM_TOKENS) is None


@pytest.mark.parametrize("policy", ["exact", "leoam:0.2", "exact:codec=bf16x"])
def test_answers_of_a_document_on_the_disk_are_right(
    policy: str, closed: list[CacheStats], tmp_path: Path
) -> None:
    found = ask(policy, (0.0, 0.1), tmp_path)
    assert [reply.score for replies in found.replies for reply in replies] == [1.0]
    tiers = closed[-1].tiers
    assert tiers["disk"].loaded_bytes > 0
    assert tiers["disk"].num_chunks > tiers["gpu"].num_chunks + tiers["cpu"].num_chunks


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["1.5", "0"], "1.5 is no share from 0 to 1"),
        (["0", "-0.1"], "-0.1"),
        (["nan", "0"], "nan is no share"),
        (["half", "0"], "half"),
        (["0.1"], "expected 2 arguments"),
    ],
)
def test_shares_that_are_none_are_refused_before_any_model_is_loaded(
    shares: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tasks", "--model", "/missing", "--shares", *shares])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
