"""``offload demo`` on the shipped model, end to end."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main

_TOKENS, _QUESTIONS = 4096, 3
_COMMON = ["demo", "--tokens", str(_TOKENS), "--facts", "40", "--threads", "1"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def outcome(disk: Path) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of one whole run, with the baseline."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(
            [*_COMMON, "--questions", str(_QUESTIONS), "--disk-path", str(disk), "--json"]
        )
    return status, json.loads(output.getvalue())


def test_demo_on_a_cache_that_does_not_fit_answers_every_question(
    outcome: tuple[int, dict[str, Any]],
) -> None:
    status, data = outcome
    answers = data["offloaded"]["answers"]
    assert [a["text"] for a in answers] == [f"{a['fact']['value']}]" for a in answers]
    assert len(answers) == data["num_correct"] == _QUESTIONS
    assert status == 0


def test_demo_on_a_cache_that_does_not_fit_gives_the_tokens_of_dynamic_cache(
    outcome: tuple[int, dict[str, Any]],
) -> None:
    _, data = outcome
    ours, theirs = data["offloaded"]["answers"], data["baseline"]["answers"]
    assert [a["token_ids"] for a in ours] == [a["token_ids"] for a in theirs]
    assert data["identical"] is True


def test_demo_keeps_most_of_the_cache_on_disk_and_reads_it_from_there(
    outcome: tuple[int, dict[str, Any]],
) -> None:
    _, data = outcome
    disk = data["stats"]["tiers"]["disk"]
    assert data["disk_share"] > 0.6
    assert disk["used_bytes"] > 0.6 * data["kv_bytes"]
    assert disk["loaded_bytes"] > data["kv_bytes"]


@pytest.mark.parametrize(("tier", "share"), [("gpu", 0.1), ("cpu", 0.15)])
def test_demo_gives_memory_tiers_a_small_share_and_they_keep_to_it(
    outcome: tuple[int, dict[str, Any]], tier: str, share: float
) -> None:
    _, data = outcome
    found = data["stats"]["tiers"][tier]
    assert found["capacity_bytes"] == int(share * data["kv_bytes"])
    assert 0 < found["peak_bytes"] <= found["capacity_bytes"]


def test_demo_stays_within_the_memory_it_allows_itself(
    outcome: tuple[int, dict[str, Any]],
) -> None:
    _, data = outcome
    assert 0 < data["peak_growth_bytes"] <= data["allowed_growth_bytes"]


def test_demo_leaves_nothing_on_the_disk(outcome: tuple[int, dict[str, Any]], disk: Path) -> None:
    assert [path for path in disk.iterdir() if path.is_dir()] == []


def test_demo_without_baseline_prints_where_the_bytes_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--capacity-gpu", "2MiB", "--capacity-cpu", "3MiB", "--capacity-disk", "64MiB"]
    run = ["--questions", "1", "--no-baseline", "--disk-path", str(tmp_path)]
    status = main([*_COMMON, *run, *sizes])
    printed = capsys.readouterr()
    capacities = {
        line.split("│")[0].strip(): line.split("│")[1].strip()
        for line in printed.out.splitlines()
        if line.count("│") == 6
    }
    assert capacities == {"gpu": "2 MiB", "cpu": "3 MiB", "disk": "64 MiB"}
    assert printed.out.splitlines()[-1] == "answers: 1 of 1 right"
    assert "DynamicCache" not in printed.out + printed.err
    assert status == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--questions", "41"], "41 questions need as many facts, but the document hides 40"),
        (["--tokens", "300"], "40 facts need"),
        (["--capacity-gpu", "64KiB"], "gpu capacity 65536 bytes is below one layer's working set"),
        (["--capacity-disk", "1MiB"], "no room for"),
        (["--capacity-cpu", "much"], "'much' (str) is not a size"),
    ],
    ids=["questions", "facts", "device", "disk", "size"],
)
def test_demo_that_cannot_be_run_says_why_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_COMMON, "--disk-path", str(tmp_path), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("offload: ")
    assert reason in printed.err.splitlines()[-1]
    assert printed.out == ""
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--questions", "-1"], ["--facts", "x"]])
def test_demo_with_a_count_that_is_none_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["demo", *arguments])
    assert refused.value.code == 2
    assert f"{arguments[1]!r} is not a positive integer" in capsys.readouterr().err
