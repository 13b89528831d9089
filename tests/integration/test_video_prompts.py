"""What a model is told, and what there is before the first frame."""

from pathlib import Path
from typing import Any

import pytest

from offload.video.answerer import Answerer
from offload.video.retrieval import Mode, RetrievalPlan
from offload.video.types import Question
from tests.support.tiny_streams import TinyStreams
from tests.support.tiny_video_models import KINDS, make_frames, text_of


@pytest.mark.parametrize("name", KINDS)
def test_choices_are_in_the_prompt_with_their_letters_and_not_in_what_retrieves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = TinyStreams(tmp_path).encode(name, make_frames(4), 4)
    told: list[str] = []
    text = stream.adapter.text

    def listen(ids: Any) -> Any:
        told.append(text_of(name, ids))
        return text(ids)

    monkeypatch.setattr(stream.adapter, "text", listen)
    answerer = Answerer(stream, RetrievalPlan("rekv", 2, 0), max_tokens=1, is_twice=True)
    answerer.ask(Question("q", "Which hand?", choices=("left", "right")))
    stream.close()
    first, last = (each for each in told if "Which hand?" in each)
    assert "left" not in first
    assert "Which hand?\nA. left\nB. right\nAnswer with the option's letter" in last


@pytest.mark.parametrize("mode", ["tokmax", "uniform"])
def test_question_before_the_first_frame_is_answered_from_nothing(
    mode: Mode, tmp_path: Path
) -> None:
    stream = TinyStreams(tmp_path).encode("llava_onevision", make_frames(4), 4)
    answer = Answerer(stream, RetrievalPlan(mode, 2, 1), max_tokens=1).ask(Question("q", "?", 0.0))
    stream.close()
    assert (answer.num_frames, answer.evidence, answer.bytes_from) == (0, (), {})
    assert answer.about["coverage"] is None
