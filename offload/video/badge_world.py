"""BadgeWorld: a synthetic video whose questions have one right answer and one frame that shows it.

Some frames show a badge, two digits on a bright plate, and a coloured block; the others show grey
clutter. The question is *colour of badge 37*, the answer one word. No badge is shown twice, so the
frame that shows it is all the evidence there is. Chance is one in eight. Knows no model; for the
one that answers see ``docs/badge-world.md``.
"""

import random
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from offload.errors import ConfigError
from offload.video.types import Frame, Image, Question

FRAME_SIZE: Final = 32
"""Height and width of a frame, in pixels."""

NUM_BADGES: Final = 100
"""Badges are called 00 to 99."""

COLOURS: Final = {
    "red": (205, 35, 35),
    "orange": (245, 140, 25),
    "yellow": (240, 230, 50),
    "green": (40, 165, 60),
    "cyan": (60, 210, 215),
    "blue": (40, 70, 215),
    "purple": (125, 45, 175),
    "pink": (245, 150, 195),
}
"""The answers, and the mean RGB of their blocks."""

BADGE_SHARE: Final = 1 / 12
"""Share of the frames of a stream that show a badge, as long as there are badges left."""

NUM_ASK_TIMES: Final = 6

PHRASES: Final = ("colour of badge", "what colour was badge", "what was the colour of badge")
"""Ways to ask. The number follows; the more words before it, the less it shows in their mean."""

# Three columns and five rows each; a row is read from its highest bit.
_GLYPHS: Final = (
    (7, 5, 5, 5, 7),
    (2, 6, 2, 2, 7),
    (7, 1, 7, 4, 7),
    (7, 1, 3, 1, 7),
    (5, 5, 7, 1, 1),
    (7, 4, 7, 1, 7),
    (7, 4, 7, 5, 7),
    (7, 1, 1, 2, 2),
    (7, 5, 7, 5, 7),
    (7, 5, 7, 1, 7),
)
_PLATE_HEIGHT: Final = 14
_PLATE_WIDTH: Final = 18


def draw_badge(badge: int, colour: str, rng: np.random.Generator) -> Image:
    """Draw a frame that shows a badge.

    Parameters
    ----------
    badge : int
        From 0 to ``NUM_BADGES - 1``.
    colour : str
        One of ``COLOURS``.
    rng : Generator
        Decides places, shades, clutter and noise.

    Returns
    -------
    ndarray, uint8 [FRAME_SIZE, FRAME_SIZE, 3], RGB
    """
    canvas = _clutter(rng)
    half = FRAME_SIZE // 2
    plate_half, block_half = (0, half) if rng.random() < 0.5 else (half, 0)
    plate = _plate(badge, rng)
    block = np.full((rng.integers(10, half - 1), rng.integers(14, FRAME_SIZE - 3), 3), 0)
    block += rng.integers(-10, 11, 3) + COLOURS[colour]
    _paste(canvas, plate, plate_half, rng)
    _paste(canvas, block, block_half, rng)
    return _with_noise(canvas, rng)


def draw_idle(rng: np.random.Generator) -> Image:
    """Draw a frame of grey clutter, uint8 [FRAME_SIZE, FRAME_SIZE, 3], RGB."""
    return _with_noise(_clutter(rng), rng)


def question_text(badge: int, phrase: str = PHRASES[0]) -> str:
    """Return what to ask about a badge: its number comes last."""
    return f"{phrase} {badge:02d}"


def make_stream(
    num_frames: int, seed: int, phrase: str = PHRASES[0]
) -> tuple[Iterator[Frame], list[Question]]:
    """Make a stream of one frame per second, and a question about each badge in it.

    Each question is asked at one of ``NUM_ASK_TIMES`` times, the last of them the end of the
    stream, and only about a badge that was shown before. The same arguments give the same stream.

    Parameters
    ----------
    num_frames : int
        Frame ``i`` is shown at second ``i``.
    seed : int
        Decides badges, colours, times and pictures.
    phrase : str
        How to ask; the model that ships knows ``PHRASES``.

    Returns
    -------
    frames : iterator of Frame
        Drawn one at a time, as they are asked for.
    questions : list of Question
        In the order in which they are asked. Their answer is one of ``COLOURS``, their only window
        the second in which the badge is shown.

    Raises
    ------
    ConfigError
        ``num_frames`` is not positive.
    """
    if num_frames < 1:
        raise ConfigError(f"a stream cannot have {num_frames} frames")
    rng = random.Random(seed)
    num_shown = min(NUM_BADGES, max(1, round(num_frames * BADGE_SHARE)))
    badges = rng.sample(range(NUM_BADGES), num_shown)
    shown = {
        time_s: (badge, rng.choice(list(COLOURS)))
        for time_s, badge in zip(rng.sample(range(num_frames), num_shown), badges, strict=True)
    }
    ask_times = [-(-num_frames * part // NUM_ASK_TIMES) for part in range(1, NUM_ASK_TIMES + 1)]
    questions = [
        Question(
            id=f"badge-{badge:02d}",
            text=question_text(badge, phrase),
            time_s=float(rng.choice([ask_s for ask_s in ask_times if ask_s > time_s])),
            answer=colour,
            windows=((float(time_s), float(time_s + 1)),),
        )
        for time_s, (badge, colour) in shown.items()
    ]
    questions.sort(key=lambda question: (question.time_s, question.id))
    return _draw_stream(num_frames, shown, seed), questions


def write_mp4(path: Path, frames: Iterable[Frame], fps: int = 1, crf: int = 23) -> None:
    """Write frames as H.264 (yuv420p) in an MP4 file.

    Parameters
    ----------
    path : Path
        Overwritten if there is one.
    frames : iterable of Frame
        All of one size, height and width even. Their times are not looked at.
    fps : int
        Frame ``i`` is shown at ``i / fps`` seconds.
    crf : int
        Constant rate factor of the encoder: 0 is lossless, 51 the worst. 23 is what it takes when
        nothing is said.

    Raises
    ------
    ConfigError
        PyAV is not installed, there are no frames, or their size is odd.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("writing a video needs PyAV: pip install 'kv-offload[video]'") from error
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise ConfigError(f"no frames to write to {path}")
    height, width, _ = first.image.shape
    if height % 2 or width % 2:
        raise ConfigError(f"H.264 needs an even height and width, found {height} and {width}")
    with av.open(path, "w", format="mp4") as container:
        # The same frames have to give the same bytes: one thread, and no macroblock trees, for
        # which x264 reads memory that it never wrote (one file in 27 differed at 32 x 32).
        options = {"crf": str(crf), "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in chain([first], remaining):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, format="rgb24")))
        container.mux(stream.encode())


def _draw_stream(num_frames: int, shown: dict[int, tuple[int, str]], seed: int) -> Iterator[Frame]:
    for time_s in range(num_frames):
        rng = np.random.default_rng((seed, time_s))
        image = draw_badge(*shown[time_s], rng) if time_s in shown else draw_idle(rng)
        yield Frame(float(time_s), image)


def _clutter(rng: np.random.Generator) -> NDArray[np.int64]:
    canvas = np.full((FRAME_SIZE, FRAME_SIZE, 3), rng.integers(70, 170))
    for _ in range(5):
        top, left = rng.integers(FRAME_SIZE - 4), rng.integers(FRAME_SIZE - 4)
        height, width = rng.integers(4, 17), rng.integers(4, 17)
        canvas[top : top + height, left : left + width] = rng.integers(50, 190)
    return canvas


def _paste(
    canvas: NDArray[np.int64], part: NDArray[np.int64], half: int, rng: np.random.Generator
) -> None:
    """Put a part anywhere in the upper or lower half, which starts at row ``half``."""
    height, width, _ = part.shape
    top = half + rng.integers(FRAME_SIZE // 2 - height + 1)
    left = rng.integers(FRAME_SIZE - width + 1)
    canvas[top : top + height, left : left + width] = part


def _plate(badge: int, rng: np.random.Generator) -> NDArray[np.int64]:
    tens, ones = (_glyph(digit) for digit in divmod(badge, 10))
    ink = np.zeros((_PLATE_HEIGHT, _PLATE_WIDTH, 1), dtype=np.int64)
    ink[2:12, 2:8, 0], ink[2:12, 10:16, 0] = tens, ones
    return np.where(ink, rng.integers(0, 40), rng.integers(215, 256))


def _glyph(digit: int) -> NDArray[np.int64]:
    rows = [[row >> 2 & 1, row >> 1 & 1, row & 1] for row in _GLYPHS[digit]]
    return np.kron(np.array(rows), np.ones((2, 2), dtype=np.int64))


def _with_noise(canvas: NDArray[Any], rng: np.random.Generator) -> Image:
    noisy: Image = np.clip(canvas + rng.normal(0, 4, canvas.shape), 0, 255).astype(np.uint8)
    return noisy
