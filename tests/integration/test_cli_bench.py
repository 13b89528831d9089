"""``offload bench``: small measurements, and soaks on faulty disks and on tiers that are broken."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.cli import main
from offload.evals import plots
from offload.soak_round import SoakRound
from offload.soak_tally import Tally
from offload.table import ChunkTable
from offload.tiers import record_header
from offload.tiers.faults import KINDS, FaultPlan
from tests.support.small_caches import check_nothing_left

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
    monkeypatch.setattr(record_header, "check_payload", lambda *_: None)
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


def measure(*arguments: str, output: Path) -> list[dict[str, Any]]:
    """Run a benchmark that is small; return its rows."""
    small = ["--shape", "tiny", "--layers", "2", "--steps", "2", "--rounds", "2", "--threads", "1"]
    assert main(["bench", *arguments, *small, "--output", str(output)]) == 0
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


@pytest.mark.leaks
def test_bench_attention_measures_contenders_on_every_cell(tmp_path: Path) -> None:
    contenders = ["dense", "dynamic", "exact", "retroinfer", "streaming:256"]
    rows = measure(
        *("attention", "--contexts", "512", "2048", "--contenders", *contenders),
        *("--budgets", "0.05", "--dtype", "float32"),
        output=tmp_path / "new" / "results",
    )
    names = ["dense", "dynamic", "exact", "retroinfer:0.05", "streaming:256"]
    assert [row["contender"] for row in rows] == 2 * names
    assert [row["num_tokens"] for row in rows] == 5 * [512] + 5 * [2048]
    assert all(row["ms_p95"] >= row["ms_median"] > 0 for row in rows)
    assert all(row["num_steps"] == 4 and row["num_rounds"] == 2 for row in rows)
    dense, dynamic, exact, clustered, streaming = rows[5:]
    assert dense["ratio"] == 1.0
    assert dense["limit_share"] > 0
    assert max(row["error_median"] for row in (dense, dynamic, exact)) < 1e-5
    assert 1e-5 < clustered["error_median"] < streaming["error_median"]
    assert clustered["index_bytes"] > 0
    assert streaming["read_bytes"] < clustered["read_bytes"] < exact["read_bytes"]
    assert exact["read_bytes"] == dense["read_bytes"]
    assert exact["made_by"]["versions"]["torch"]


@pytest.mark.leaks
def test_bench_attention_on_disk_reads_what_does_not_fit(tmp_path: Path) -> None:
    rows = measure(
        *("attention", "--contexts", "2048", "--contenders", "flexgen", "exact"),
        *("--ram-share", "all", "0.2", "--batch", "2", "--disk-path", str(tmp_path / "disk")),
        output=tmp_path / "results",
    )
    streamed, fits, _, limited = rows
    kv_bytes = 2 * 2 * 2048 * 2 * 2 * 64 * 2
    assert fits["disk_bytes"] is None
    assert streamed["disk_bytes"] == pytest.approx(kv_bytes, rel=0.1)
    assert 0.5 * kv_bytes < limited["disk_bytes"] < 0.95 * kv_bytes
    assert limited["bandwidths"]["disk"] > 0
    check_nothing_left(tmp_path / "disk")


@pytest.mark.parametrize("prefill", [[], ["--prefill"]])
def test_bench_decode_compares_logits_with_those_of_the_first_contender(
    prefill: list[str], tmp_path: Path
) -> None:
    contenders = ["--contenders", "dynamic", "exact", "streaming:256"]
    arguments = ("decode", "--contexts", "600", "--dtype", "float32", *contenders, *prefill)
    dynamic, exact, streaming = measure(*arguments, output=tmp_path)
    assert dynamic["error_median"] is None
    assert exact["error_median"] < 1e-4 < streaming["error_median"]


def test_bench_suite_with_options_changes_what_it_says(tmp_path: Path) -> None:
    arguments = ("suite", "cpu-ram", "--contexts", "512", "--contenders", "dense", "exact")
    rows = measure(*arguments, output=tmp_path)
    assert [(row["name"], row["contender"]) for row in rows] == [
        ("cpu-ram", "dense"),
        ("cpu-ram", "exact"),
    ]


def test_bench_page_has_tables_bandwidths_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure("attention", "--contexts", "512", "--plots", "--contenders", "dense", output=tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "## 512 tokens, attention of tiny, 2 layers" in page
    assert "Measured in between" in page
    drawn = sorted(file.name for file in tmp_path.glob("*.svg"))
    assert drawn == (["limit_share_0.svg", "ms_per_step_0.svg"] if plots.can_draw() else [])
    assert "against tokens of context" in page or not drawn
    assert f"report: {tmp_path / 'report.md'}" in capsys.readouterr().out


def test_bench_with_json_prints_the_lines_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("attention", "--contexts", "512", "--contenders", "dense", "--json")
    measure(*arguments, output=tmp_path)
    assert capsys.readouterr().out == (tmp_path / "rows.jsonl").read_text()


def test_bench_with_a_time_limit_begins_no_further_round(tmp_path: Path) -> None:
    arguments = ("attention", "--contexts", "512", "--seconds", "0", "--contenders", "dense")
    [row] = measure(*arguments, output=tmp_path)
    assert row["num_rounds"] == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["attention", "--contenders", "fast"], "unknown contender 'fast'"),
        (["attention", "--contexts", "4000000000"], "take fewer|measure fewer of them together"),
        (["attention", "--capacity", "disk=1GiB", "gpu=1GiB"], "not in order"),
        (["suite", "tpu"], "unknown suite 'tpu'"),
    ],
)
def test_bench_of_what_cannot_be_says_why_in_the_last_line(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--contenders", "exact"] if "--contenders" not in arguments else []
    output = ["--output", str(tmp_path), "--shape", "tiny"]
    assert main(["bench", *arguments, *given, *output]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("offload: ")
    assert re.search(reason, last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_bench_suite_for_a_device_without_one_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "suite", "gpu", "--output", str(tmp_path)]) == 2
    assert "suite 'gpu' needs a CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bench_with_an_output_that_cannot_be_written_says_so_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "attention", "--output", str(tmp_path / "file" / "results")]) == 2
    assert "the results cannot be written" in capsys.readouterr().err
