"""``offload bench soak`` on a real disk with injected faults, and on tiers that are broken."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.soak_round import SoakRound
from offload.soak_tally import Tally
from offload.table import ChunkTable
from offload.tiers import record_io
from offload.tiers.faults import KINDS, FaultPlan

_HEAVY = "delay=0.2:0.001,hang=0.02:0.55,fail=0.03,full=0.05,truncate=0.1,flip=0.1"


def soak(directory: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the command; return its exit status and what it printed as JSON."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["bench", "soak", "--disk-path", str(directory), "--json", *arguments])
    return status, json.loads(output.getvalue())


def values(data: dict[str, Any]) -> dict[str, int]:
    """Return the value of every gate."""
    return {gate["name"]: gate["value"] for gate in data["gates"]}


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """A few rounds under more faults of every kind than any disk has."""
    directory = tmp_path_factory.mktemp("disk")
    return soak(directory, "--rounds", "3", "--seed", "10", "--faults", _HEAVY)


def test_soak_under_heavy_faults_returns_nothing_wrong_and_loses_nothing(
    heavy: tuple[int, dict[str, Any]],
) -> None:
    status, data = heavy
    assert status == 0
    assert data["has_passed"] is True
    assert not any(value for name, value in values(data).items() if name != "memory growth")
    assert data["num_rounds"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_soak_under_heavy_faults_has_injected_every_kind(
    heavy: tuple[int, dict[str, Any]], kind: str
) -> None:
    assert heavy[1]["tally"]["faults"][kind] > 0


def test_soak_under_heavy_faults_has_seen_damage_refused_and_stores_fail(
    heavy: tuple[int, dict[str, Any]],
) -> None:
    errors = heavy[1]["tally"]["errors"]
    assert errors["CorruptChunk"] > 0
    assert errors.get("StorageError", 0) + errors.get("DiskFull", 0) > 0
    assert heavy[1]["tally"]["num_results"] > 100
    assert heavy[1]["tally"]["num_chunks"] > 20


def test_soak_without_faults_raises_nothing_but_that_tiers_are_full(tmp_path: Path) -> None:
    status, data = soak(tmp_path, "--rounds", "2", "--faults", "none")
    assert status == 0
    assert set(data["tally"]["errors"]) <= {"CapacityError"}
    assert data["faults"] == "none"


def test_soak_for_a_time_ends_with_the_round_in_which_it_is_over(tmp_path: Path) -> None:
    status, data = soak(tmp_path, "--minutes", "0.01", "--faults", "none")
    assert status == 0
    assert data["num_rounds"] >= 1
    assert data["duration_s"] >= 0.6


def test_soak_of_a_tier_that_does_not_verify_fails_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_io, "verify", lambda *_: None)
    status, data = soak(tmp_path, "--rounds", "2", "--faults", "flip=0.5,truncate=0.5")
    assert status == 1
    assert data["has_passed"] is False
    found = values(data)
    assert found["damage not noticed"] > 0
    assert found["wrong results"] > 0
    assert all(finding.startswith("seed ") for finding in data["tally"]["unnoticed"])


def test_soak_of_a_table_that_forgets_references_fails_at_the_first_broken_invariant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChunkTable, "release", lambda *_: [])
    status, data = soak(tmp_path, "--rounds", "9", "--faults", "none")
    assert status == 1
    assert values(data)["broken invariants"] > 0
    assert data["num_rounds"] == 1


def test_rounds_of_the_same_seed_do_the_same(tmp_path: Path) -> None:
    tallies = []
    for _ in range(2):
        tallies.append(Tally())
        SoakRound(5, FaultPlan(), tmp_path, tallies[-1]).run(30)
    assert tallies[0].actions == tallies[1].actions


def test_soak_prints_gates_and_what_was_injected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--rounds", "1", "--faults", "fail=0.1", "--disk-path", str(tmp_path)]
    assert main(["bench", "soak", *arguments]) == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.out.splitlines()]
    assert "lost chunks 0 0 held" in lines
    assert "faults fail=0.1" in lines
    assert any(line.startswith("injected") and line.endswith("fail") for line in lines)
    assert "soak" in printed.err
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--faults", "flip=2"], "offload: the rate of flip is 2.0, not from 0 to 1"),
        (["--faults", "melt"], "offload: 'melt' is no fault"),
    ],
)
def test_soak_with_a_plan_that_is_none_says_why_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "soak", "--disk-path", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(reason)
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench"],
        ["bench", "fry"],
        ["bench", "soak", "--minutes", "0"],
        ["bench", "soak", "--minutes", "nan"],
        ["bench", "soak", "--rounds", "0"],
        ["bench", "soak", "--rounds", "1", "--minutes", "1"],
    ],
)
def test_bench_with_arguments_that_do_not_parse_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert "usage: offload bench" in capsys.readouterr().err
