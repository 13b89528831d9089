"""Adapters of video models: finding and loading them, and what they make of single frames."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from offload.errors import ConfigError
from offload.video.adapters import ADAPTERS, find_adapter, load_adapter
from offload.video.llava_next_video import LlavaNextVideo
from offload.video.types import Frame
from offload.video.units import UnitTable, laid_out
from tests.support.tiny_video_models import (
    KINDS,
    make_frames,
    tiny_adapter,
    tiny_options,
    tiny_tokenizer,
    tiny_video_model,
)

all_kinds = pytest.mark.parametrize("name", KINDS)


@all_kinds
def test_find_adapter_goes_by_the_class_of_the_model_and_its_bases(name: str) -> None:
    model = tiny_video_model(name)
    derived = type("Mine", (type(model),), {})(model.config)
    assert find_adapter(model, tiny_tokenizer(name)).name == name
    assert find_adapter(derived, tiny_tokenizer(name)).name == name


def test_find_adapter_for_another_model_names_what_can_be_streamed() -> None:
    with pytest.raises(ConfigError) as caught:
        find_adapter(nn.Linear(2, 2), None)
    assert all(name in str(caught.value) for name in ("Linear", *ADAPTERS))


def _save(name: str, folder: Path) -> None:
    tiny_video_model(name).save_pretrained(folder)
    tiny_tokenizer(name).save_pretrained(folder)


@all_kinds
def test_loaded_adapter_encodes_as_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    _save(name, tmp_path)
    loaded = load_adapter(tmp_path, torch.float32, "cpu", **tiny_options(name))
    frames = make_frames(4)
    pairs = list(zip(loaded.encode(frames), tiny_adapter(name).encode(frames), strict=True))
    assert pairs
    for ours, saved in pairs:
        torch.testing.assert_close(ours.embeds, saved.embeds, rtol=0, atol=0)
    assert loaded.opening() == tiny_adapter(name).opening()


def test_loaded_adapter_has_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    _save("qwen3_vl", tmp_path)
    loaded = load_adapter(tmp_path, torch.bfloat16, **tiny_options("qwen3_vl"))
    (unit,) = loaded.encode(make_frames(2))
    assert unit.added is not None
    assert {loaded.dtype, unit.embeds.dtype, unit.added.dtype} == {torch.bfloat16}


_OF_PICTURES = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("video_preprocessor_config.json", _OF_PICTURES),
        ("processor_config.json", {"video_processor": _OF_PICTURES}),
        ("processor_config.json", {"image_processor": _OF_PICTURES}),
        ("preprocessor_config.json", _OF_PICTURES),
    ],
)
def test_loaded_adapter_normalises_pictures_as_the_folder_says(
    file: str, said: dict[str, Any], tmp_path: Path
) -> None:
    name = "qwen2_5_vl"
    _save(name, tmp_path)
    (tmp_path / file).write_text(json.dumps(said))
    options = tiny_options(name)
    frames = make_frames(2)
    (unit,) = load_adapter(tmp_path, torch.float32, **options).encode(frames)
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7]}
    (expected,) = find_adapter(
        tiny_video_model(name), tiny_tokenizer(name), **told, **options
    ).encode(frames)
    torch.testing.assert_close(unit.embeds, expected.embeds, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config\.json cannot be read"),
        ("{", r"config\.json cannot be read"),
        ("[]", "holds a list; an object was expected"),
        ("{}", "holds no architecture, which cannot be streamed; .*Qwen3VLForConditional"),
        ('{"architectures": ["LlamaForCausalLM"]}', "holds LlamaForCausalLM, which cannot"),
        ('{"architectures": ["Qwen3VLForConditionalGeneration"]}', "cannot be loaded"),
    ],
)
def test_folder_without_a_video_model_is_refused(
    config: str | None, message: str, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        load_adapter(tmp_path)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="9 to 8 tokens"):
        find_adapter(
            tiny_video_model("qwen3_vl"), tiny_tokenizer("qwen3_vl"), min_tokens=9, max_tokens=8
        )


def test_question_of_llava_next_video_has_the_tokens_of_the_whole_text() -> None:
    pieces = ["t ", *map(chr, range(32, 127)), "\n"]
    core = Tokenizer(models.WordLevel({piece: n for n, piece in enumerate(pieces)}, unk_token="~"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"t |[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    adapter = LlavaNextVideo(tiny_video_model("llava_next_video"), tokenizer)
    question, answer = adapter.asking("who is that")
    assert tokenizer.convert_ids_to_tokens(answer)[:2] == ["t ", "A"]
    assert [*question, *answer] == tokenizer("\nwho is that ASSISTANT:")["input_ids"]


@pytest.mark.parametrize(("time_s", "written"), [(9.4, "9.4"), (10.0, "10.0"), (3599.96, "3600.0")])
def test_unit_of_qwen3_grows_with_the_digits_of_its_time(time_s: float, written: str) -> None:
    adapter = tiny_adapter("qwen3_vl")
    (unit,) = adapter.encode([Frame(time_s, frame.image) for frame in make_frames(2)])
    front = adapter.token_ids(f"<{written} seconds><|vision_start|>")
    assert unit.num_tokens == len(front) + 2 * 3 + 1
    assert unit.advance == len(front) + 3 + 1
    assert torch.equal(unit.embeds[: len(front)], adapter.text(front).embeds)


def test_text_in_a_unit_of_qwen3_adds_nothing_to_the_first_layers() -> None:
    adapter = tiny_adapter("qwen3_vl")
    (unit,) = adapter.encode(make_frames(2))
    assert unit.added is not None
    front = len(adapter.token_ids("<0.5 seconds><|vision_start|>"))
    is_text = torch.ones(unit.num_tokens, dtype=torch.bool)
    is_text[front:-1] = False
    assert unit.added.shape == (2, unit.num_tokens, 64)
    assert not unit.added[:, is_text].any()
    assert unit.added[:, ~is_text].abs().amax(2).min() > 0


def test_model_that_takes_embeddings_only_refuses_features_for_its_layers() -> None:
    with pytest.raises(ConfigError, match="llava_onevision: its layers take nothing"):
        tiny_adapter("llava_onevision").added_inputs(torch.zeros(1, 2, 64))


@pytest.mark.parametrize(("away_s", "expected"), [(0.0, 0.0), (1.5, 6.0), (86400.0, 1200.0)])
def test_unit_of_qwen25_lasts_twice_the_time_between_its_frames_within_reason(
    away_s: float, expected: float
) -> None:
    first, second = make_frames(2)
    (unit,) = tiny_adapter("qwen2_5_vl").encode([first, Frame(away_s, second.image)])
    assert unit.step == (expected, 0.0, 0.0)


def test_positions_of_times_that_were_rounded_are_those_of_exact_ones() -> None:
    frames = [Frame(round(n / 3, 6), frame.image) for n, frame in enumerate(make_frames(12))]
    places = UnitTable().add(tiny_adapter("qwen2_5_vl").encode(frames))
    positions, end = laid_out(places, 5, 3)
    assert positions[0, ::6].tolist() == [5 + 4 * number // 3 for number in range(6)]
    assert positions[1:, ::6].tolist() == [[5] * 6] * 2
    assert end == 5 + 3
