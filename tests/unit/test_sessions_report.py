"""Lengths of time and lists of layers, as people read and write them."""

import argparse

import pytest

from offload.cli_sessions import lifetime
from offload.sessions_report import format_layers, format_span


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604_800), ("2w", 1_209_600)],
)
def test_lifetime_as_text_is_read_in_its_unit(text: str, seconds: float) -> None:
    assert lifetime(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0s", "-1d", "1y", "1 d", "7D", "1e3s", "nans"])
def test_lifetime_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 90s"):
        lifetime(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.2, "0 s"), (59, "59 s"), (60, "1 min"), (10_800, "3 h"), (1e6, "12 d")],
)
def test_span_is_written_in_its_largest_unit(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@pytest.mark.parametrize(
    ("layers", "text"),
    [((0,), "0"), ((0, 1, 2, 5), "0–2, 5"), ((3, 7, 8), "3, 7–8"), (range(32), "0–31")],
)
def test_layers_are_written_as_runs(layers: tuple[int, ...], text: str) -> None:
    assert format_layers(layers) == text
