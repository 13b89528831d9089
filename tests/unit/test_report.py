"""Tables and data of statistics, and the verdict of the demo."""

import io
import json

import pytest
from rich.console import Console, RenderableType

from offload.demo import Answer, Session
from offload.demo_report import DemoReport, print_report, report_data
from offload.recall_data import Fact
from offload.report import share_on, stats_data, stats_report
from offload.stats import CacheStats, TierStats

_STATS = CacheStats(
    tiers={
        "gpu": TierStats(1 << 20, 2 << 20, 3 << 20, 10, 0, 5 << 20),
        "cpu": TierStats(0, 1 << 20, 4 << 20, 0, 0, 0),
        "disk": TierStats(7 << 30, 8 << 30, 9 << 30, 30, 11 << 30, 12 << 30),
    },
    num_tokens=2560,
    num_chunks=40,
    tail_bytes=4096,
    staging_bytes=8192,
    load_wait_s=1.25,
    store_wait_s=0.5,
    prefetch_hit_rate=0.875,
    promoted_chunks=6,
    demoted_chunks=17,
    failed_stores=3,
    unneeded_failures=1,
    rescued_chunks=5,
)
_RIGHT = Answer(Fact("abcd", "1234", 99), "1234]", (49, 50, 51, 52, 93), is_correct=True)
_WRONG = Answer(Fact("efgh", "5678", 7), "5679]", (53, 54, 55, 57, 93), is_correct=False)
_RIGHT_WITH_OTHER_TAIL = Answer(_RIGHT.fact, "1234]", (49, 50, 51, 52, 93, 10), is_correct=True)


def _session(*answers: Answer) -> Session:
    return Session(answers, read_tokens=2560, read_s=2.0, answer_tokens=10, answer_s=4.0)


def _report(ours: Session, theirs: Session | None) -> DemoReport:
    return DemoReport(ours, theirs, _STATS, 5 << 20, 6 << 20, 7 << 20)


def _text(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _printed(report: DemoReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("start", "cells"),
    [
        ("gpu", ["3 MiB", "1 MiB", "2 MiB", "10", "0 B", "5 MiB"]),
        ("disk", ["9 GiB", "7 GiB", "8 GiB", "30", "11 GiB", "12 GiB"]),
        ("tier", ["capacity", "used", "peak", "chunks", "read", "written"]),
    ],
)
def test_report_of_statistics_has_one_row_per_tier(start: str, cells: list[str]) -> None:
    lines = _text(stats_report(_STATS)).splitlines()
    [row] = [line for line in lines if line.strip().startswith(start)]
    found = [cell.strip() for cell in row.replace("┃", "│").split("│")]
    assert found == [start, *cells]


@pytest.mark.parametrize(
    "words",
    [
        "tokens 2560",
        "chunks 40",
        "growing chunks 4 KiB",
        "staging 8 KiB",
        "waited for loads 1.25 s",
        "waited for stores 0.50 s",
        "prefetch hit rate 87.5%",
        "promoted, demoted 6, 17 chunks",
        "failed, unneeded stores 3, 1",
        "rescued from them 5 chunks",
    ],
)
def test_report_of_statistics_shows_what_belongs_to_no_tier(words: str) -> None:
    lines = [" ".join(line.split()) for line in _text(stats_report(_STATS)).splitlines()]
    assert words in lines


def test_data_of_statistics_survives_json() -> None:
    data = json.loads(json.dumps(stats_data(_STATS)))
    assert data["tiers"]["disk"]["loaded_bytes"] == 11 << 30
    assert data["prefetch_hit_rate"] == 0.875


@pytest.mark.parametrize(("tier", "share"), [("gpu", 0.25), ("cpu", 0.0), ("disk", 0.75)])
def test_share_of_a_tier_is_its_part_of_all_chunks(tier: str, share: float) -> None:
    assert share_on(_STATS, tier) == share


def test_share_of_a_tier_in_an_empty_cache_is_zero() -> None:
    empty = CacheStats({"disk": TierStats(0, 0, 1, 0, 0, 0)}, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0)
    assert share_on(empty, "disk") == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "passed", "last_line"),
    [
        (_session(_RIGHT), _session(_RIGHT), True, "tokens: identical"),
        (_session(_RIGHT), None, True, "answers: 1 of 1 right"),
        (_session(_WRONG), None, False, "answers: 0 of 1 right"),
        (_session(_RIGHT, _WRONG), _session(_RIGHT, _WRONG), False, "tokens: identical"),
        (_session(_RIGHT), _session(_RIGHT_WITH_OTHER_TAIL), False, "tokens: differ for abcd"),
    ],
    ids=["all right", "no baseline", "wrong", "both wrong", "other tokens"],
)
def test_demo_passes_only_with_right_answers_and_identical_tokens(
    ours: Session, theirs: Session | None, passed: bool, last_line: str
) -> None:
    report = _report(ours, theirs)
    assert report.has_passed is passed
    assert report_data(report)["passed"] is passed
    assert _printed(report).splitlines()[-1] == last_line


@pytest.mark.parametrize(
    "words",
    [
        "abcd 99 1234] 1234] right",
        "efgh 7 5678] 5679] wrong",
        "OffloadedCache 1,280 tokens/s 2.5 tokens/s 6.0 3 MiB",
        "DynamicCache 1,280 tokens/s 2.5 tokens/s 6.0 5 MiB",
        "KV cache of 2560 tokens: 5 MiB, 75% on disk",
        "answers: 1 of 2 right",
    ],
)
def test_report_of_the_demo_shows_answers_speeds_and_where_the_bytes_are(words: str) -> None:
    session = _session(_RIGHT, _WRONG)
    lines = _printed(_report(session, session)).replace("│", " ").splitlines()
    assert words in [" ".join(line.split()) for line in lines]
