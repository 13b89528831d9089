"""What one policy has saved, another goes on with: the chunks are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from offload import OffloadedCache, SessionStore
from offload.cli import main
from offload.demo import Reader, choose_facts, kv_bytes, small_capacity
from offload.prefill import prefill
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model

TIERS = ("gpu", "cpu", "disk")
NUM_TOKENS = 4096
DOCUMENT = build_document(NUM_TOKENS, 8, seed=3)
FACTS = choose_facts(DOCUMENT, 3, seed=3)
BUDGETS = {"exact": None, "adaptive": 0.02}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_recall_model()[0]


def settings(model: PreTrainedModel, policy: str, scratch: Path) -> dict[str, Any]:
    """Return arguments of a cache most of which is on disk."""
    capacity = small_capacity(kv_bytes(model, NUM_TOKENS)) | {"disk": "1GiB"}
    budget = BUDGETS[policy]
    return {"policy": policy, "budget": budget, "capacity": capacity, "disk_path": scratch}


def ask_all(cache: OffloadedCache) -> None:
    """Ask for each fact on a fork of its own."""
    reader = Reader(*load_recall_model(), DOCUMENT, 1024)
    for fact in FACTS:
        fork = cache.fork()
        assert is_correct(fact, reader.ask(fork, fact))
        fork.close()


@pytest.fixture(scope="module")
def roots(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Roots with the document as session ``document``, by the policy that has read and saved it."""
    found = {policy: tmp_path_factory.mktemp(policy) for policy in BUDGETS}
    ids = torch.tensor([DOCUMENT.token_ids])
    for policy, folder in found.items():
        with (
            SessionStore(folder / "root", quota="1GiB", min_free=0) as store,
            OffloadedCache(TIERS, **settings(model, policy, folder)) as cache,
        ):
            prefill(model, cache, ids, 1024, lambda count: None)
            ask_all(cache)
            cache.save("document", store=store, model=model, token_ids=ids)
    return {policy: folder / "root" for policy, folder in found.items()}


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [("exact", "adaptive"), ("adaptive", "exact"), ("adaptive", "adaptive")],
)
def test_session_answers_questions_under_another_policy_than_it_was_saved_with(
    saved_by: str, loaded_by: str, model: PreTrainedModel, roots: dict[str, Path], tmp_path: Path
) -> None:
    with (
        SessionStore(roots[saved_by]) as store,
        OffloadedCache.load(
            "document", model, store=store, **settings(model, loaded_by, tmp_path)
        ) as cache,
    ):
        ask_all(cache)
        stats = cache.stats()
        cache.check_integrity()
    if loaded_by == "exact":
        assert stats.retrieved_tokens == 0
    else:
        assert 0 < stats.retrieved_tokens <= 0.05 * stats.covered_tokens


def test_known_prefix_answers_questions_under_another_policy(
    model: PreTrainedModel, roots: dict[str, Path], tmp_path: Path
) -> None:
    with (
        SessionStore(roots["exact"]) as store,
        OffloadedCache(TIERS, **settings(model, "adaptive", tmp_path)) as cache,
    ):
        ids = torch.tensor([DOCUMENT.token_ids])
        assert cache.reuse(ids, model, store=store) > 0.9 * NUM_TOKENS
        ask_all(cache)
        assert cache.stats().retrieved_tokens > 0


@pytest.mark.parametrize("policies", [("exact", "adaptive"), ("adaptive", "exact")])
def test_generate_goes_on_with_a_session_under_another_policy(
    policies: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = load_recall_model()
    document = str(tokenizer.decode(DOCUMENT.token_ids, skip_special_tokens=True))
    prompts = [document + FACTS[0].prompt, f". {FACTS[1].prompt}"]
    folders = ["--root", str(tmp_path / "root"), "--disk-path", str(tmp_path / "disk")]
    options = ["--session", "chat", "--max-new-tokens", "8", "--threads", "1", "--json", *folders]
    for fact, prompt, policy in zip(FACTS, prompts, policies, strict=False):
        arguments = ["--model", "recall", "--policy", policy, "--prompt", prompt]
        assert main(["generate", *arguments, *options]) == 0
        data = json.loads(capsys.readouterr().out)
        assert is_correct(fact, list(data["text"].encode()))
        assert (data["stats"]["retrieved_tokens"] > 0) == (policy == "adaptive")
    assert data["resumed_tokens"] > NUM_TOKENS
