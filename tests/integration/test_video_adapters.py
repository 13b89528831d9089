"""Every kind of video model: a stream in pieces is the same as one forward over the whole prompt.

The prompt, its token types and its grids come from transformers' own processor, the positions from
the model itself, and the pixels from a few lines of numpy.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from offload.video import layers
from offload.video.answerer import Answerer
from offload.video.encoder import StreamEncoder
from offload.video.question_pass import QuestionPass
from offload.video.retrieval import RetrievalPlan
from offload.video.rotate import rotated
from offload.video.stream import VideoStream
from offload.video.types import Frame, Question
from offload.video.units import laid_out
from tests.support.tiny_video_models import (
    KINDS,
    make_frames,
    text_of,
    tiny_adapter,
    tiny_video_model,
)
from tests.support.video_prompts import plain_frames, whole_prompt

_COUNT = 20
_WIDE = 10**6
_QUESTION = "What was on the table?"
_ROUNDING = 1e-5

all_kinds = pytest.mark.parametrize("name", KINDS)


class _Streams:
    """Streams of a test, which end with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.open: list[VideoStream] = []

    def encode(
        self, name: str, frames: Sequence[Frame], pieces: int, window: int = _WIDE
    ) -> VideoStream:
        path = self._folder / str(len(self.open))
        path.mkdir()
        stream = VideoStream(
            tiny_adapter(name),
            tiers=["gpu", "disk"],
            capacity={"gpu": "64KiB", "disk": "64MiB"},
            disk_path=path,
            chunk_tokens=16,
        )
        self.open.append(stream)
        encoder = StreamEncoder(stream, window)
        for start in range(0, len(frames), pieces):
            encoder.add(frames[start : start + pieces])
        return stream


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[_Streams]:
    found = _Streams(tmp_path)
    yield found
    for stream in found.open:
        stream.close()


def _prompt(name: str, frames: Sequence[Frame], fps: float = 1.0) -> dict[str, Any]:
    return whole_prompt(name, frames, _QUESTION, fps)


def _one_forward(name: str, prompt: dict[str, Any]) -> DynamicCache:
    model = tiny_video_model(name)
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(**prompt, past_key_values=cache, use_cache=True)
    return cache


def _own_positions(name: str, prompt: dict[str, Any]) -> Tensor:
    """Return the positions of a prompt as the model counts them, [num_axes, num_tokens]."""
    ids = prompt["input_ids"]
    if not name.startswith("qwen"):
        return torch.arange(ids.shape[1])[None]
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")
    wanted = {key: prompt[key] for key in names if key in prompt}
    positions: Tensor = tiny_video_model(name).model.get_rope_index(**wanted)[0][:, 0]
    return positions


@all_kinds
@pytest.mark.parametrize("pieces", [1, 7, _COUNT])
def test_stream_in_pieces_with_a_wide_window_equals_one_forward_over_the_prompt(
    name: str, pieces: int, streams: _Streams
) -> None:
    frames = plain_frames(name, _COUNT)
    prompt = _prompt(name, frames)
    stream = streams.encode(name, frames, pieces)
    expected, positions = _one_forward(name, prompt), _own_positions(name, prompt)
    count = stream.store.num_tokens
    for layer in range(stream.store.num_layers):
        keys, values = stream.store.read(layer, [range(count)])
        turned = rotated(stream.adapter, keys, positions[:, :count])
        one_shot = expected.layers[layer]
        assert isinstance(one_shot, DynamicLayer)
        assert one_shot.keys is not None
        assert one_shot.values is not None
        torch.testing.assert_close(turned, one_shot.keys[0, :, :count], rtol=0, atol=_ROUNDING)
        torch.testing.assert_close(values, one_shot.values[0, :, :count], rtol=0, atol=_ROUNDING)


@all_kinds
def test_question_behind_all_units_gets_the_logits_of_the_whole_prompt(
    name: str, streams: _Streams
) -> None:
    frames = plain_frames(name, _COUNT)
    prompt = _prompt(name, frames)
    stream = streams.encode(name, frames, 7)
    num_units = len(stream.units.places) - 1
    asked = QuestionPass(stream, RetrievalPlan("recent", num_units), num_units, slice(0, 1))
    closing, asking = stream.adapter.closing(), stream.adapter.asking(_QUESTION)
    parts = [] if closing is None else [closing]
    parts.append(stream.adapter.text([*asking[0], *asking[1]]))
    starts = [sum(part.advance for part in parts[:number]) for number in range(len(parts))]
    positions = [part.positions + start for part, start in zip(parts, starts, strict=True)]
    asked.next(torch.cat(positions, 1), sum(part.advance for part in parts))
    embeds = torch.cat([part.embeds for part in parts])
    logits = stream.adapter.head(layers.run(stream.adapter, embeds, asked))
    with torch.no_grad():
        expected = tiny_video_model(name)(**prompt).logits[0, -len(embeds) :]
    torch.testing.assert_close(logits, expected, rtol=0, atol=_ROUNDING)


@all_kinds
@pytest.mark.parametrize("is_twice", [False, True], ids=["one pass", "two passes"])
def test_answer_from_all_units_equals_generate_on_the_whole_prompt(
    name: str, is_twice: bool, streams: _Streams
) -> None:
    frames = plain_frames(name, _COUNT)
    prompt = _prompt(name, frames)
    stream = streams.encode(name, frames, 7)
    plan = RetrievalPlan("tokmax", _COUNT)
    answerer = Answerer(stream, plan, max_tokens=8, is_twice=is_twice)
    generated = tiny_video_model(name).generate(**prompt, max_new_tokens=8, do_sample=False)
    answer = text_of(name, generated[0, prompt["input_ids"].shape[1] :].tolist())
    assert len(set(answer)) >= 4
    assert answerer.ask(Question("1", _QUESTION)).text == answer


@all_kinds
@pytest.mark.parametrize("window", [0, 45], ids=["no window", "small window"])
def test_stream_with_a_small_window_is_the_same_whatever_the_pieces(
    name: str, window: int, streams: _Streams
) -> None:
    frames = plain_frames(name, _COUNT)
    wide, *narrow = (
        streams.encode(name, frames, pieces, size)
        for pieces, size in ((_COUNT, _WIDE), (1, window), (7, window), (_COUNT, window))
    )
    tokens = [range(wide.store.num_tokens)]
    last = wide.store.num_layers - 1
    everything = torch.cat(wide.store.read(last, tokens))
    one, *others = (torch.cat(each.store.read(last, tokens)) for each in narrow)
    assert float((one - everything).abs().max()) > 1e-2
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=_ROUNDING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_odd_last_frame_waits_until_its_partner_comes(name: str, streams: _Streams) -> None:
    frames = plain_frames(name, 6)
    stream = streams.encode(name, frames[:2], 1)
    encoder = StreamEncoder(stream, _WIDE)
    assert encoder.add(frames[2:5]) == 2
    assert [place.num_frames for place in stream.units.places] == [0, 2, 2]
    assert encoder.add(frames[5:]) == 2
    whole = streams.encode(name, frames, 6)
    assert stream.units.num_frames == whole.units.num_frames == 6
    tokens = [range(whole.store.num_tokens)]
    for ours, theirs in zip(stream.store.read(2, tokens), whole.store.read(2, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=_ROUNDING)


@all_kinds
def test_retrieved_units_stand_as_in_a_shorter_video_of_just_these(
    name: str, streams: _Streams
) -> None:
    stream = streams.encode(name, plain_frames(name, _COUNT), _COUNT)
    chosen = [1, 2, 5, 9]
    places = [stream.units.places[1 + unit] for unit in chosen]
    opening = stream.units.places[0]
    positions, end = laid_out(places, opening.advance, stream.adapter.num_axes)
    shorter = _cut(name, _prompt(name, plain_frames(name, _COUNT)), stream, chosen)
    expected = _own_positions(name, shorter)
    first, count = opening.num_tokens, positions.shape[1]
    torch.testing.assert_close(positions, expected[:, first : first + count], rtol=0, atol=0)
    assert expected[:, first + count].tolist() == [end] * stream.adapter.num_axes


@pytest.mark.parametrize("fps", [0.25, 0.7, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_a_stream_are_the_models_own_at_any_rate(
    name: str, fps: float, streams: _Streams
) -> None:
    frames = plain_frames(name, 12, fps)
    stream = streams.encode(name, frames, 5)
    expected = _own_positions(name, _prompt(name, frames, fps))
    opening, *places = stream.units.places
    ours = torch.cat([place.positions + place.origin for place in stream.units.places], 1)
    torch.testing.assert_close(ours, expected[:, : ours.shape[1]], rtol=0, atol=0)
    compact, end = laid_out(places, opening.advance, 3)
    torch.testing.assert_close(compact, ours[:, opening.num_tokens :], rtol=0, atol=0)
    assert expected[:, ours.shape[1]].tolist() == [end] * 3


@pytest.mark.parametrize(
    ("name", "time_s", "expected"),
    [
        ("llava_onevision", 9.0, 9),
        ("qwen2_5_vl", 9.0, 8),
        ("qwen2_5_vl", 9.1, 10),
        ("qwen3_vl", 8.5, 8),
        ("qwen3_vl", 9.5, 10),
    ],
)
def test_question_sees_no_unit_of_which_a_frame_is_not_before_it(
    name: str, time_s: float, expected: int, streams: _Streams
) -> None:
    stream = streams.encode(name, plain_frames(name, 12), 12)
    answerer = Answerer(stream, RetrievalPlan("tokmax", 2), max_tokens=1)
    assert answerer.ask(Question("1", _QUESTION, time_s)).num_frames == expected


def test_stream_whose_pictures_change_size_goes_on(streams: _Streams) -> None:
    frames = [*make_frames(4, 1.0, (32, 48)), *make_frames(4, 1.0, (64, 32))]
    stream = streams.encode("qwen2_5_vl", frames, 8)
    places = stream.units.places[1:]
    assert [place.num_tokens for place in places] == [6, 6, 3, 3]
    assert [place.positions.amax(1).tolist() for place in places[1:3]] == [[0, 1, 2], [0, 2, 0]]
    answer = Answerer(stream, RetrievalPlan("recent", 3), max_tokens=2)
    assert answer.ask(Question("1", _QUESTION)).num_frames == 8


def _cut(
    name: str, prompt: dict[str, Any], stream: VideoStream, chosen: Sequence[int]
) -> dict[str, Any]:
    """Return a prompt without the units that were not chosen."""
    places = stream.units.places
    kept = [*places[0].tokens]
    for unit in chosen:
        kept.extend(places[1 + unit].tokens)
    kept.extend(range(places[-1].tokens.stop, prompt["input_ids"].shape[1]))
    shorter = dict(prompt)
    for key in ("input_ids", "mm_token_type_ids"):
        if key in prompt:
            shorter[key] = prompt[key][:, kept]
    if "video_grid_thw" in prompt:
        grid = prompt["video_grid_thw"].clone()
        grid[:, 0] = len(chosen)
        shorter["video_grid_thw"] = grid
    return shorter
