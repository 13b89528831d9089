"""Positions of streams of video are those that the models give one prompt."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.video.stream import VideoStream
from offload.video.units import laid_out
from tests.support.tiny_streams import TinyStreams, own_positions
from tests.support.tiny_video_models import KINDS
from tests.support.video_prompts import plain_frames, whole_prompt


@pytest.fixture
def streams(tmp_path: Path) -> Iterator[TinyStreams]:
    found = TinyStreams(tmp_path)
    yield found
    for stream in found.open:
        stream.close()


@pytest.mark.parametrize("name", KINDS)
def test_retrieved_units_stand_as_in_a_shorter_video_of_just_these(
    name: str, streams: TinyStreams
) -> None:
    stream = streams.encode(name, plain_frames(name, 20), 20)
    chosen = [1, 2, 5, 9]
    places = [stream.units.places[1 + unit] for unit in chosen]
    opening = stream.units.places[0]
    positions, end = laid_out(places, opening.advance, stream.adapter.num_axes)
    shorter = _cut(name, whole_prompt(name, plain_frames(name, 20), "What?", 1.0), stream, chosen)
    expected = own_positions(name, shorter)
    first, count = opening.num_tokens, positions.shape[1]
    torch.testing.assert_close(positions, expected[:, first : first + count], rtol=0, atol=0)
    assert expected[:, first + count].tolist() == [end] * stream.adapter.num_axes


@pytest.mark.parametrize("fps", [0.25, 0.7, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_of_a_stream_are_the_models_own_at_any_rate(
    name: str, fps: float, streams: TinyStreams
) -> None:
    frames = plain_frames(name, 12, fps)
    stream = streams.encode(name, frames, 5)
    expected = own_positions(name, whole_prompt(name, frames, "What?", fps))
    opening, *places = stream.units.places
    ours = torch.cat([place.positions + place.origin for place in stream.units.places], 1)
    torch.testing.assert_close(ours, expected[:, : ours.shape[1]], rtol=0, atol=0)
    compact, end = laid_out(places, opening.advance, 3)
    torch.testing.assert_close(compact, ours[:, opening.num_tokens :], rtol=0, atol=0)
    assert expected[:, ours.shape[1]].tolist() == [end] * 3


def _cut(
    name: str, prompt: dict[str, Any], stream: VideoStream, chosen: Sequence[int]
) -> dict[str, Any]:
    """Return a prompt without the units that were not chosen."""
    # In the store the first unit begins at a chunk; in a prompt there is nothing before it.
    ends = [0, *accumulate(place.num_tokens for place in stream.units.places)]
    tokens = [range(start, end) for start, end in pairwise(ends)]
    kept = [*tokens[0], *chain.from_iterable(tokens[1 + unit] for unit in chosen)]
    kept.extend(range(ends[-1], prompt["input_ids"].shape[1]))
    shorter = dict(prompt)
    for key in ("input_ids", "mm_token_type_ids"):
        if key in prompt:
            shorter[key] = prompt[key][:, kept]
    if "video_grid_thw" in prompt:
        grid = prompt["video_grid_thw"].clone()
        grid[:, 0] = len(chosen)
        shorter["video_grid_thw"] = grid
    return shorter
