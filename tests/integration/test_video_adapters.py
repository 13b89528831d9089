"""Every kind of video model: a stream in pieces is the same as one forward over the whole prompt.

The prompt, its token types and its grids come from transformers' own processor, the positions from
the model itself, and the pixels from a few lines of numpy.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from offload.video import layers
from offload.video.answerer import Answerer
from offload.video.encoder import StreamEncoder
from offload.video.question_pass import QuestionPass
from offload.video.retrieval import RetrievalPlan
from offload.video.rotate import rotated
from offload.video.types import Frame, Question
from tests.support.tiny_streams import WIDE, TinyStreams, own_positions
from tests.support.tiny_video_models import (
    KINDS,
    make_frames,
    text_of,
    tiny_video_model,
)
from tests.support.video_prompts import plain_frames, whole_prompt

_COUNT = 20
_QUESTION = "What was on the table?"
_ROUNDING = 1e-5

all_kinds = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[TinyStreams]:
    found = TinyStreams(tmp_path)
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


@all_kinds
@pytest.mark.parametrize("pieces", [1, 7, _COUNT])
def test_stream_in_pieces_with_a_wide_window_equals_one_forward_over_the_prompt(
    name: str, pieces: int, streams: TinyStreams
) -> None:
    frames = plain_frames(name, _COUNT)
    prompt = _prompt(name, frames)
    stream = streams.encode(name, frames, pieces)
    expected, positions = _one_forward(name, prompt), own_positions(name, prompt)
    tokens = [place.tokens for place in stream.units.places]
    count = sum(map(len, tokens))
    for layer in range(stream.store.num_layers):
        keys, values = stream.store.read(layer, tokens)
        turned = rotated(stream.adapter, keys, positions[:, :count])
        one_shot = expected.layers[layer]
        assert isinstance(one_shot, DynamicLayer)
        assert one_shot.keys is not None
        assert one_shot.values is not None
        torch.testing.assert_close(turned, one_shot.keys[0, :, :count], rtol=0, atol=_ROUNDING)
        torch.testing.assert_close(values, one_shot.values[0, :, :count], rtol=0, atol=_ROUNDING)


@all_kinds
def test_question_behind_all_units_gets_the_logits_of_the_whole_prompt(
    name: str, streams: TinyStreams
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
    name: str, is_twice: bool, streams: TinyStreams
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
    name: str, window: int, streams: TinyStreams
) -> None:
    frames = plain_frames(name, _COUNT)
    wide, *narrow = (
        streams.encode(name, frames, pieces, size)
        for pieces, size in ((_COUNT, WIDE), (1, window), (7, window), (_COUNT, window))
    )
    tokens = [range(wide.store.num_tokens)]
    last = wide.store.num_layers - 1
    everything = torch.cat(wide.store.read(last, tokens))
    one, *others = (torch.cat(each.store.read(last, tokens)) for each in narrow)
    assert float((one - everything).abs().max()) > 1e-2
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=_ROUNDING)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_odd_last_frame_waits_until_its_partner_comes(name: str, streams: TinyStreams) -> None:
    frames = plain_frames(name, 6)
    stream = streams.encode(name, frames[:2], 1)
    encoder = StreamEncoder(stream, WIDE)
    assert encoder.add(frames[2:5]) == 2
    assert [place.num_frames for place in stream.units.places] == [0, 2, 2]
    assert encoder.add(frames[5:]) == 2
    whole = streams.encode(name, frames, 6)
    assert stream.units.num_frames == whole.units.num_frames == 6
    tokens = [range(whole.store.num_tokens)]
    for ours, theirs in zip(stream.store.read(2, tokens), whole.store.read(2, tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=_ROUNDING)


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
    name: str, time_s: float, expected: int, streams: TinyStreams
) -> None:
    stream = streams.encode(name, plain_frames(name, 12), 12)
    answerer = Answerer(stream, RetrievalPlan("tokmax", 2), max_tokens=1)
    assert answerer.ask(Question("1", _QUESTION, time_s)).num_frames == expected


def test_stream_whose_pictures_change_size_goes_on(streams: TinyStreams) -> None:
    frames = [*make_frames(4, 1.0, (32, 48)), *make_frames(4, 1.0, (64, 32))]
    stream = streams.encode("qwen2_5_vl", frames, 8)
    places = stream.units.places[1:]
    assert [place.num_tokens for place in places] == [6, 6, 3, 3]
    assert [place.positions.amax(1).tolist() for place in places[1:3]] == [[0, 1, 2], [0, 2, 0]]
    answer = Answerer(stream, RetrievalPlan("recent", 3), max_tokens=2)
    assert answer.ask(Question("1", _QUESTION)).num_frames == 8
