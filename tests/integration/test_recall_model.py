"""The committed recall model: that it retrieves from afar, and that it is a stock model."""

import functools
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from offload.recall_data import RecallDocument, build_document, encode
from offload.recall_model import load_recall_model
from tools.recall_eval import answers, answers_with_lesion, far_facts, prefill
from tools.recall_init import recall_config, structured_model
from tools.train_recall_model import save_tokenizer

NUM_QUESTIONS = 10
SEED = 11


@functools.cache
def recall_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_recall_model()


@functools.cache
def document() -> RecallDocument:
    return build_document(4096, 40, SEED)


@functools.cache
def prefilled() -> DynamicCache:
    return prefill(recall_model()[0], document().token_ids)


def test_recall_model_asked_about_4k_tokens_answers_nine_of_ten() -> None:
    facts = far_facts(document(), NUM_QUESTIONS, SEED)
    right = [answers(recall_model()[0], prefilled(), document(), fact) for fact in facts]
    assert len(right) == NUM_QUESTIONS
    assert sum(right) >= 9


def test_recall_model_cut_to_sinks_and_window_answers_next_to_nothing() -> None:
    facts = far_facts(document(), NUM_QUESTIONS, SEED)
    right = [answers_with_lesion(recall_model()[0], prefilled(), fact) for fact in facts]
    assert sum(right) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_without_a_prefilled_cache_gives_the_answer(dtype: torch.dtype) -> None:
    model, _ = load_recall_model(dtype)
    assert model.dtype == dtype
    short = build_document(1024, 10, SEED)
    assert answers(model, DynamicCache(config=model.config), short, short.facts[0])


def test_recall_model_is_stock_and_attends_fully_in_every_layer() -> None:
    config = recall_model()[0].config
    assert config.model_type == "qwen3"
    assert config.layer_types == ["full_attention"] * 4


def test_circuit_before_training_answers_next_to_nothing() -> None:
    model = structured_model(seed=0).eval()
    short = build_document(1024, 10, SEED)
    cache = prefill(model, short.token_ids)
    assert sum(answers(model, cache, short, fact) for fact in short.facts) <= 1


def test_shipped_configuration_is_the_one_that_the_tools_make() -> None:
    made, shipped = recall_config(), recall_model()[0].config
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "hidden_size", "vocab_size"):
        assert getattr(shipped, name) == getattr(made, name), name


@pytest.mark.parametrize("text", ["\n[qmzk:48213]", "naïve – text", "\x00\x7f\t"])
def test_tokenizer_maps_any_text_to_its_bytes_and_back(text: str) -> None:
    tokenizer = recall_model()[1]
    assert tokenizer(text)["input_ids"] == encode(text)
    assert tokenizer.decode(encode(text)) == text


def test_tokenizer_made_again_is_the_shipped_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    shipped = recall_model()[1]
    assert (tmp_path / "tokenizer.json").read_text() == shipped.backend_tokenizer.to_str(
        pretty=True
    )
