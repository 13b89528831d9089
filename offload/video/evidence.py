"""Pictures of what an answer rests on: a contact sheet and a timeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offload.errors import ConfigError
from offload.video.thumbnails import Thumbnails
from offload.video.types import Answer

_TILE = (176, 150)
_BAR_HEIGHT = 6


def contact_sheet(answer: Answer, thumbnails: Thumbnails, path: Path) -> None:
    """Draw the frames of the evidence in time order, with their times and shares of attention.

    Parameters
    ----------
    answer : Answer
    thumbnails : Thumbnails
        Of the stream.
    path : Path
        A PNG file.

    Raises
    ------
    ConfigError
        Pillow is missing, or no pictures were kept.
    """
    try:
        from PIL import Image as Pictures
        from PIL import ImageDraw
    except ImportError as error:
        raise ConfigError("pictures need Pillow: pip install 'kv-offload[video]'") from error
    width, height = _TILE
    count = max(1, len(answer.evidence))
    sheet = Pictures.new("RGB", (max(3, count) * width, height + 40), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 6), f"{answer.question.text}", fill="black")
    draw.text((8, 22), f"> {answer.text}", fill="black")
    best = max((each.score for each in answer.evidence), default=0.0) or 1.0
    for column, each in enumerate(sorted(answer.evidence, key=lambda each: each.time_s)):
        picture = Pictures.fromarray(thumbnails.get(each.frame))
        factor = min((width - 8) / picture.width, (height - 36) / picture.height)
        picture = picture.resize((round(picture.width * factor), round(picture.height * factor)))
        left, top = column * width + 4, 44
        sheet.paste(picture, (left, top))
        below = top + height - 32
        length = round((width - 8) * each.score / best)
        draw.rectangle((left, below, left + length, below + _BAR_HEIGHT), fill="#2a6fbb")
        draw.text((left, below + 8), f"{clock(each.time_s)}  {each.score:.1%}", fill="black")
    sheet.save(path, "PNG")


def timeline(answer: Answer, path: Path, duration_s: float | None = None) -> None:
    """Draw when the evidence was shown, how much it counted, and when the question was asked.

    Parameters
    ----------
    answer : Answer
    path : Path
        A PNG file.
    duration_s : float, optional
        Of the stream.

    Raises
    ------
    ConfigError
        matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'kv-offload[plot]'") from error
    figure: Any = Figure(figsize=(9, 2.4), layout="constrained")
    axes = figure.subplots()
    times = [each.time_s for each in answer.evidence]
    scores = [each.score for each in answer.evidence]
    axes.vlines(times, 0, scores, color="#2a6fbb", linewidth=2)
    axes.plot(times, scores, "o", color="#2a6fbb", markersize=4)
    for start, end in answer.question.windows:
        axes.axvspan(start, end, color="#8bc34a", alpha=0.4, label="evidence as annotated")
    asked = answer.question.time_s
    if asked is not None:
        axes.axvline(asked, color="#c0392b", linestyle="--", label="asked")
    last = max([*times, asked or 0.0, duration_s or 0.0, 1.0])
    axes.set_xlim(0, last)
    axes.set_ylim(0, None)
    axes.set_xlabel("seconds")
    axes.set_ylabel("share of attention")
    axes.set_title(f"{answer.question.text}  >  {answer.text}", fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), fontsize=8)
    figure.savefig(path, dpi=120)


def draw_all(
    answers: Sequence[Answer], thumbnails: Thumbnails, folder: Path, duration_s: float | None = None
) -> list[Path]:
    """Draw sheet and timeline of each answer into a folder; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for answer in answers:
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in answer.question.id)
        sheet, plot = folder / f"{name}-frames.png", folder / f"{name}-timeline.png"
        contact_sheet(answer, thumbnails, sheet)
        timeline(answer, plot, duration_s)
        made += [sheet, plot]
    return made


def clock(time_s: float) -> str:
    """Return a time as people write it."""
    minutes, seconds = divmod(time_s, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{seconds:04.1f}" if hours else f"{minutes}:{seconds:04.1f}"
