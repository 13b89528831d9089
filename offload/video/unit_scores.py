"""Scores of frames that another model gave: what ``external`` retrieval goes by."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.video.dataset_fields import parse_lines, read_text


def read_unit_scores(path: Path, frames_per_unit: int = 1) -> Callable[[str, int], Sequence[float]]:
    """Return what ``RetrievalPlan.choose`` takes, from a JSONL file.

    A line is ``{"frame": 352, "score": 0.31}``, the frame counted from the beginning of the stream,
    at the rate at which it was encoded. With ``"question"`` the score is for that question only.
    What a unit is worth is the best of its frames; one without a score comes last.

    Parameters
    ----------
    path : Path
    frames_per_unit : int
        Of the adapter.

    Raises
    ------
    ConfigError
        Names file, line and field.
    """
    known: dict[str | None, dict[int, float]] = {}
    for line in parse_lines(read_text(path), str(path)):
        unit = line.integer("frame") // frames_per_unit
        scores = known.setdefault(line.optional(line.text, "question"), {})
        scores[unit] = max(scores.get(unit, -math.inf), line.real("score"))

    def choose(question: str, num_units: int) -> list[float]:
        scores = known.get(None, {}) | known.get(question, {})
        return [scores.get(unit, -math.inf) for unit in range(num_units)]

    return choose
