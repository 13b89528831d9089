"""``offload bench simulate``, and what it is made of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offload.bench.sim_fit import fit_costs
from offload.bench.sim_machine import BOXES
from offload.cli import main

SMALL = ("bench", "simulate", "--synthetic", "sessions=20", "think_s=3")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*SMALL, *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_simulate_prints_a_row_for_every_number_of_boxes_and_load(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run_json(capsys, "--boxes", "1", "2", "--load", "1", "4")
    assert [(row["boxes"], row["load"]) for row in found["rows"]] == [
        (1, 1),
        (1, 4),
        (2, 1),
        (2, 4),
    ]
    assert [each["tier"] for each in found["cached_tokens"]] == ["device", "host", "disk", "remote"]
    assert found["rows"][0]["prices"]["disk"] == 0.1


def test_simulate_from_files_that_it_wrote_gives_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, box = str(tmp_path / "trace"), str(tmp_path / "box.json")
    run_json(capsys, "--set", "host_bytes=1e9", "--write-trace", trace, "--write-machine", box)
    arguments = ["bench", "simulate", "--trace", trace, "--json"]
    assert main([*arguments, "--machine", box]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--set", "host_bytes=1e9"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert first["box"]["host_bytes"] == 10**9


def test_simulate_with_a_plot_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    assert main([*SMALL, "--load", "1", "2", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "a million cached tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--machine", "none"), "none of 8b, 70b"),
        (("--set", "speed=1"), "'speed=1': NAME is one of"),
        (("--set", "name=1"), "this is no number"),
        (("--prices", "disk=cheap"), "'cheap' is not a number"),
        (("--load", "0"), "times its load"),
        (("--plot", "/nonexistent/plot.png"), "cannot be written"),
    ],
)
def test_simulate_with_impossible_options_is_refused(
    arguments: tuple[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"speed": 1}, {"decode_s": -1.0}], ids=["unknown", "impossible"]
)
def test_box_in_a_file_that_is_wrong_is_refused(
    tmp_path: Path, change: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "box.json"
    path.write_text(json.dumps(BOXES["8b"].to_json() | change))
    assert main([*SMALL, "--machine", str(path)]) == 2
    assert next(iter(change)) in capsys.readouterr().err


def test_costs_of_noisy_times_are_found_again() -> None:
    draw = np.random.default_rng(0)
    amounts = [(1.0, float(n), float(n * c)) for n in (16, 128, 512) for c in (0, 1000, 4000)] * 20
    costs = (5e-3, 1e-4, 1e-8)
    timings = [
        (work, float(np.dot(work, costs)) * float(draw.uniform(0.8, 1.2))) for work in amounts
    ]
    assert fit_costs(timings) == pytest.approx(costs, rel=0.1)


def test_cost_that_would_be_below_nothing_is_left_out() -> None:
    timings = [((1.0, 1.0), 3.0), ((1.0, 2.0), 2.0), ((1.0, 3.0), 1.0)]
    constant, slope = fit_costs(timings)
    assert slope == 0.0
    assert constant > 0.0
