"""Frames come to the encoder in pieces: many where they wait, each at once where they do not."""

from pathlib import Path

import numpy as np
import pytest

from offload.errors import ConfigError
from offload.video.adapters import find_adapter
from offload.video.playing import in_pieces
from offload.video.source import Source
from offload.video.types import Frame
from offload.video.unit_scores import read_unit_scores
from tests.support.tiny_video_models import tiny_tokenizer, tiny_video_model

IMAGE = np.zeros((2, 2, 3), np.uint8)


class Arriving(Source):
    """Frames that arrive in groups: of each, all but the last one wait."""

    def __init__(self, *groups: int) -> None:
        super().__init__("arriving")
        ends = np.cumsum(groups)
        self._ahead = [number + 1 not in ends for number in range(ends[-1])]
        self._next = 0

    @property
    def is_ahead(self) -> bool:
        return self._ahead[self._next - 1]

    def read_frame(self) -> Frame:
        if self._next == len(self._ahead):
            raise StopIteration
        self._next += 1
        return Frame(float(self._next - 1), IMAGE)

    def _release(self) -> None:
        return


@pytest.mark.parametrize(
    ("groups", "after_s", "pieces"),
    [
        ((1, 1, 1), -1.0, [1, 1, 1]),
        ((3, 20, 2), -1.0, [3, 16, 4, 2]),
        ((3, 4), 1.0, [1, 4]),
        ((3, 4), 6.0, []),
    ],
)
def test_frames_come_in_pieces_of_what_waits(
    groups: tuple[int, ...], after_s: float, pieces: list[int]
) -> None:
    found = list(in_pieces(Arriving(*groups), after_s))
    assert [len(piece) for piece in found] == pieces
    times = [frame.time_s for piece in found for frame in piece]
    assert times == [float(k) for k in range(sum(groups)) if k > after_s]


def test_scores_of_frames_are_those_of_their_unit_and_question(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text(
        '{"frame": 0, "score": 0.5}\n{"frame": 1, "score": -1}\n{"frame": 4, "score": 2}\n'
        '{"frame": 3, "score": 9, "question": "who"}\n'
    )
    choose = read_unit_scores(path, frames_per_unit=2)
    assert choose("what", 4) == [0.5, -np.inf, 2.0, -np.inf]
    assert choose("who", 3) == [0.5, 9.0, 2.0]


def test_scores_without_a_frame_name_file_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"frame": 0, "score": 0.5}\n{"score": 1}\n')
    with pytest.raises(ConfigError, match=r"scores.jsonl, line 2, field 'frame'"):
        read_unit_scores(path)


def test_option_that_an_adapter_does_not_have_is_named() -> None:
    model, tokenizer = tiny_video_model("llava_onevision"), tiny_tokenizer("llava_onevision")
    with pytest.raises(ConfigError, match="LlavaOnevision has no option max_tokens"):
        find_adapter(model, tokenizer, max_tokens=5)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_adapter_knows_the_tokens_of_its_units(name: str) -> None:
    adapter = find_adapter(tiny_video_model(name), tiny_tokenizer(name))
    image = np.zeros((40, 60, 3), np.uint8)
    [unit] = adapter.encode([Frame(0.0, image)])
    assert unit.num_tokens == adapter.unit_tokens
