"""Adapters of video models: finding and loading them, and what they make of single frames."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import (
    smart_resize as smart_resize_of_video,
)

from offload.errors import ConfigError
from offload.video.adapters import ADAPTERS, find_adapter, load_adapter
from offload.video.llava_next_video import LlavaNextVideo
from offload.video.patches import fitting_size, patches
from offload.video.pixels import normalised
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


@pytest.mark.parametrize("width", [17, 90, 640, 1280, 3000])
@pytest.mark.parametrize("height", [16, 100, 480, 721, 2160])
@pytest.mark.parametrize("factor", [28, 32])
def test_size_of_pictures_is_that_of_transformers(height: int, width: int, factor: int) -> None:
    least, most = 128 * factor**2, 768 * factor**2
    size = fitting_size(height, width, factor, least, most)
    assert size == smart_resize(height, width, factor, least, most)
    if min(height, width) >= factor:
        # A video of two frames, to which twice as many pixels are allowed.
        assert size == smart_resize_of_video(2, height, width, 2, factor, 2 * least, 2 * most)


def test_picture_of_a_single_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="4000 x 8 pixels"):
        fitting_size(8, 4000, 28, 1, 10**6)


def test_patches_lie_token_by_token() -> None:
    frames, channels, rows, columns, merge, size = 2, 3, 2, 3, 2, 4
    edge = merge * size
    pixels = torch.randn(frames, channels, rows * edge, columns * edge)
    expected = [
        torch.stack(
            [
                pixels[frame, channel, top + y, left + x]
                for channel in range(channels)
                for frame in range(frames)
                for y in range(size)
                for x in range(size)
            ]
        )
        for token_top in range(0, rows * edge, edge)
        for token_left in range(0, columns * edge, edge)
        for top in range(token_top, token_top + edge, size)
        for left in range(token_left, token_left + edge, size)
    ]
    assert torch.equal(patches(pixels, size, merge), torch.stack(expected))


def test_resized_pictures_are_those_of_transformers_but_for_rounding() -> None:
    rows, columns, colours = np.meshgrid(np.arange(75), np.arange(130), [0, 1, 2], indexing="ij")
    image = (128 + 100 * np.sin(rows / 9 + colours) * np.cos(columns / 13)).astype(np.uint8)
    limits = (4 * 16**2, 12 * 16**2)
    theirs = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=limits[0], max_pixels=limits[1])
    found = theirs(image, return_tensors="pt")
    size = fitting_size(75, 130, 16, *limits)
    ours = patches(normalised([image, image], size), 8, 2)
    assert found["image_grid_thw"].tolist() == [[1, size[0] // 8, size[1] // 8]]
    # One of 255 steps of a colour, whose deviation is 0.26.
    torch.testing.assert_close(ours, found["pixel_values"], rtol=0, atol=1.01 / 255 / 0.26)


@pytest.mark.parametrize("size", [(40, 71), (71, 40), (24, 24)])
def test_llava_next_video_cuts_off_what_hangs_over_its_square(size: tuple[int, int]) -> None:
    name = "llava_next_video"
    (frame,) = make_frames(1, 1.0, size)
    height, width = get_resize_output_image_size(frame.image, 32, default_to_square=False)
    top, left = int((height - 32) / 2), int((width - 32) / 2)
    pixels = normalised([frame.image], (height, width))[:, :, top : top + 32, left : left + 32]
    model = tiny_video_model(name)
    expected = model.model.get_video_features(
        pixels[None], vision_feature_layer=-2, vision_feature_select_strategy="default"
    ).pooler_output[0]
    (unit,) = tiny_adapter(name).encode([frame])
    torch.testing.assert_close(unit.embeds, expected, rtol=0, atol=0)


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
