"""BadgeWorld: what its frames show, what is asked when, and that the shipped model can answer."""

import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase

from offload.errors import ConfigError
from offload.video.badge_model import badge_pixels, load_badge_model
from offload.video.badge_world import (
    COLOURS,
    FRAME_SIZE,
    NUM_BADGES,
    PHRASES,
    draw_badge,
    draw_idle,
    make_stream,
    question_text,
    write_mp4,
)
from offload.video.types import Frame, Image
from tools.badge_bank import COLOUR_NAMES, compress, draw_bank
from tools.badge_config import TOKENS_PER_FRAME, badge_config, new_model
from tools.badge_eval import ASSETS, Exam, Examinee
from tools.badge_language import LanguagePhase
from tools.badge_vision import VisionPhase
from tools.train_badge_model import train

MAX_FOLDER_BYTES = 4 << 20
NUM_ASKED = 32


@functools.cache
def badge_model() -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase]:
    return load_badge_model()


@functools.cache
def examinee() -> Examinee:
    return Examinee(ASSETS, torch.float32)


def colour_of(image: Image) -> str | None:
    """Name the colour of the saturated pixels of a picture; None if there are next to none."""
    channels = image.reshape(-1, 3).astype(int)
    saturated = channels[np.ptp(channels, axis=1) > 60]
    if len(saturated) < 50:
        return None
    mean = saturated.mean(0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


@pytest.mark.parametrize("colour", COLOURS)
def test_badge_frame_holds_a_block_of_the_named_colour(colour: str) -> None:
    image = draw_badge(37, colour, np.random.default_rng(5))
    assert image.shape == (FRAME_SIZE, FRAME_SIZE, 3)
    assert image.dtype == np.uint8
    assert colour_of(image) == colour


def test_badge_frames_of_the_same_draw_differ_in_the_digits_alone() -> None:
    images = [draw_badge(badge, "red", np.random.default_rng(1)) for badge in range(NUM_BADGES)]
    assert len({image.tobytes() for image in images}) == NUM_BADGES
    rows, columns = np.nonzero((images[18] != images[60]).any(-1))
    assert np.ptp(rows) < 10
    assert np.ptp(columns) < 14


def test_idle_frame_holds_no_colour() -> None:
    assert colour_of(draw_idle(np.random.default_rng(2))) is None


@pytest.mark.parametrize("num_frames", [1, 40, 600])
def test_stream_of_a_given_length_has_one_frame_per_second(num_frames: int) -> None:
    frames, questions = make_stream(num_frames, seed=0)
    assert [frame.time_s for frame in frames] == list(range(num_frames))
    assert questions


def test_stream_shows_the_answer_of_each_question_in_its_window_and_nowhere_else() -> None:
    frames, questions = make_stream(300, seed=1)
    answers = {question.windows[0]: question.answer for question in questions}
    found = {(f.time_s, f.time_s + 1): colour_of(f.image) for f in frames}
    assert {window: colour for window, colour in found.items() if colour} == answers


def test_questions_of_a_stream_are_asked_in_order_after_their_badge_was_shown() -> None:
    _, questions = make_stream(600, seed=2)
    times = [question.time_s or 0.0 for question in questions]
    assert times == sorted(times)
    assert len(set(times)) == 6
    assert times[-1] == 600
    assert all(q.windows[0][1] <= time_s for q, time_s in zip(questions, times, strict=True))
    assert len({question.text for question in questions}) == len(questions) == 50


@pytest.mark.parametrize("phrase", PHRASES)
def test_questions_in_another_phrase_are_the_same_questions(phrase: str) -> None:
    frames, questions = make_stream(100, seed=2, phrase=phrase)
    plain_frames, plain = make_stream(100, seed=2)
    assert [q.text for q in questions] == [f"{phrase} {q.text[-2:]}" for q in plain]
    assert [replace(q, text="") for q in questions] == [replace(q, text="") for q in plain]
    assert np.array_equal(next(frames).image, next(plain_frames).image)


def test_stream_longer_than_there_are_badges_shows_each_once() -> None:
    _, questions = make_stream(5000, seed=3)
    assert {q.text for q in questions} == {question_text(badge) for badge in range(NUM_BADGES)}


def test_stream_of_the_same_seed_is_the_same_and_of_another_is_not() -> None:
    (frames, questions), (again, questions_again) = make_stream(30, seed=4), make_stream(30, seed=4)
    assert questions == questions_again
    assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, again, strict=True))
    assert make_stream(30, seed=5)[1] != questions


def test_stream_of_a_year_gives_its_first_frame_at_once() -> None:
    frames, _ = make_stream(365 * 24 * 3600, seed=6)
    assert next(frames).time_s == 0


def test_stream_without_frames_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot have 0 frames"):
        make_stream(0, seed=0)


@pytest.mark.parametrize("fps", [1, 25])
def test_mp4_decodes_to_all_frames_at_their_times(fps: int, tmp_path: Path) -> None:
    path = tmp_path / "stream.mp4"
    frames = list(make_stream(60, seed=7)[0])
    write_mp4(path, frames, fps=fps)
    with av.open(path) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = list(container.decode(video=0))
    assert [frame.time for frame in decoded] == pytest.approx([i / fps for i in range(60)])
    images = [frame.to_ndarray(format="rgb24").astype(int) for frame in decoded]
    errors = [np.abs(a - b.image).mean() for a, b in zip(images, frames, strict=True)]
    assert max(errors) < 12


def test_mp4_of_the_same_frames_has_the_same_bytes(tmp_path: Path) -> None:
    paths = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in paths:
        write_mp4(path, make_stream(40, seed=8)[0])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_mp4_without_frames_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no frames"):
        write_mp4(tmp_path / "none.mp4", [])
    assert not list(tmp_path.iterdir())


def test_mp4_of_odd_size_is_refused_with_the_size(tmp_path: Path) -> None:
    odd = Frame(0.0, np.zeros((32, 33, 3), np.uint8))
    with pytest.raises(ConfigError, match="32 and 33"):
        write_mp4(tmp_path / "odd.mp4", [odd])


def test_mp4_without_pyav_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'kv-offload\[video\]'"):
        write_mp4(tmp_path / "a.mp4", make_stream(2, seed=0)[0])


def test_bank_keeps_every_picture_in_its_place_through_the_codec() -> None:
    bank = draw_bank(num_drawings=2, num_idle=40, seed=9)
    assert len(bank.images) == bank.num_shown + 40 == 240
    names = [COLOUR_NAMES[colour] for colour in bank.colours]
    found = [colour_of(image) for image in bank.images]
    assert found[: bank.num_shown] == names
    assert found[bank.num_shown :] == [None] * 40


def test_vision_phase_of_a_new_model_lowers_its_loss() -> None:
    phase = VisionPhase(new_model(seed=0), draw_bank(num_drawings=2, num_idle=40, seed=0), seed=0)
    phase.num_steps = 30
    losses = [record.loss for record in train(phase)]
    assert np.mean(losses[-3:]) < losses[0] - 1


def test_language_phase_of_the_shipped_model_finds_its_answers_right() -> None:
    phase = LanguagePhase(badge_model()[0], draw_bank(num_drawings=2, num_idle=40, seed=10), 0)
    assert phase.loss_and_accuracy(step=0)[1] >= 0.95


def test_shipped_model_is_stock_and_small() -> None:
    model, _ = badge_model()
    assert type(model) is LlavaOnevisionForConditionalGeneration
    made, shipped = badge_config().to_dict(), model.config.to_dict()
    for part in ("text_config", "vision_config"):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            assert shipped[part][name] == made[part][name], (part, name)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < MAX_FOLDER_BYTES


@pytest.mark.parametrize(
    "exam",
    [
        Exam(8),
        Exam(64),
        Exam(32, newline=False),
        Exam(32, first_token=False),
        Exam(32, crf=23),
        Exam(32, crf=33),
    ],
)
def test_shipped_model_with_all_frames_in_context_names_the_colour(exam: Exam) -> None:
    assert examinee().num_right(exam, NUM_ASKED) >= NUM_ASKED - 1


def test_shipped_model_without_the_frame_of_the_badge_falls_to_chance() -> None:
    assert examinee().num_right(Exam(32, blind=True), NUM_ASKED) <= NUM_ASKED // 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("phrase", [*PHRASES, "What was the colour of badge"])
def test_generate_from_pixels_with_the_chat_template_gives_the_answer(
    dtype: torch.dtype, phrase: str
) -> None:
    # Not checked: the declared ``self`` of ``generate`` fits no class that has the method.
    model: Any
    model, tokenizer = load_badge_model(dtype)
    frames, questions = make_stream(24, seed=11, phrase=phrase)
    images = compress([frame.image for frame in frames], crf=23)
    content = [{"type": "video"}, {"type": "text", "text": questions[0].text + "?"}]
    messages: list[Any] = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(prompt, str)
    # One more for the newline that the model puts behind a video.
    prompt = prompt.replace("<video>", "<video>" * (len(images) * TOKENS_PER_FRAME + 1))
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **inputs, pixel_values_videos=badge_pixels(images)[None].to(dtype), max_new_tokens=4
    )
    generated = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(generated, skip_special_tokens=True) == questions[0].answer
    assert generated[-1] == tokenizer.eos_token_id


def test_tokenizer_reads_a_question_as_words_whatever_its_capitals_and_marks() -> None:
    _, tokenizer = badge_model()
    assert tokenizer.tokenize("What colour was badge 07?") == [
        "what",
        "colour",
        "was",
        "badge",
        "07",
    ]
    assert tokenizer.tokenize(question_text(7)) == ["colour", "of", "badge", "07"]
