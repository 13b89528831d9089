"""From what was seen to rows and tables."""

import pytest

from offload.bench.counters import add, between, hidden_share, hit_rate
from offload.bench.limits import Bandwidths, Moved
from offload.bench.rows import Sample, percentile, ratios
from offload.bench.sheets import bench_figures, bench_sheets
from offload.bench.summary import limit_share, timings
from tests.support.bench import make_row


def test_ratios_compare_medians_round_by_round() -> None:
    slow = Sample(rounds=[[2.0, 4.0, 9.0], [6.0, 6.0, 6.0]])
    fast = Sample(rounds=[[1.0, 2.0, 1.0], [3.0, 2.0, 2.0]])
    assert ratios(fast, slow) == [4.0, 3.0]


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 10), (0.95, 19), (1.0, 20)])
def test_percentile_is_a_value_that_enough_others_do_not_exceed(share: float, value: int) -> None:
    assert percentile(list(range(20, 0, -1)), share) == value


def test_timings_of_a_sample_count_every_row_of_the_batch() -> None:
    sample = Sample(rounds=[[0.1, 0.3], [0.2, 0.4]], first_s=2.0)
    found = timings(sample, sample, batch=4)
    assert found["tokens_per_s"] == pytest.approx(16.0)
    assert found["ms_median"] == pytest.approx(250.0)
    assert found["ms_p95"] == pytest.approx(400.0)
    assert found["first_ms"] == pytest.approx(2000.0)
    assert (found["ratio_low"], found["ratio_high"]) == (1.0, 1.0)


def test_limit_share_uses_the_bandwidth_of_each_round() -> None:
    sample = Sample(rounds=[[1.0], [2.0], [4.0]])
    speeds = [Bandwidths(100.0), Bandwidths(50.0), Bandwidths(25.0)]
    assert limit_share(sample, Moved(0.0, 50.0), speeds) == pytest.approx(0.5)
    assert limit_share(sample, Moved(None, 50.0), speeds) is None


def test_counters_grow_by_differences_that_add_up() -> None:
    total = add(between({"a": 1.0}, {"a": 4.0, "b": 2.0}), {"a": 1.0, "c": 5.0})
    assert total == {"a": 4.0, "b": 2.0, "c": 5.0}


def test_rates_of_counters_that_do_not_exist_are_unknown() -> None:
    assert hit_rate({}) is None
    assert hidden_share({}) is None


def test_rates_of_counters_are_shares() -> None:
    assert hit_rate({"rows.line_lookups": 8.0, "rows.line_hits": 6.0}) == 0.75
    assert hidden_share({"rows.read_s": 4.0, "rows.wait_s": 1.0}) == 0.75
    assert hidden_share({"rows.read_s": 4.0, "rows.wait_s": 9.0}) == 0.0


def test_sheets_show_what_nobody_counts_as_a_dash_and_group_rows_by_cell() -> None:
    rows = [
        make_row(),
        make_row(contender="exact", limit_share=0.5, disk_bytes=2048.0),
        make_row(num_tokens=1024, ram_share=0.1),
    ]
    speed, moved, *others = bench_sheets(rows)
    assert [len(sheet.rows) for sheet in (speed, moved, *others)] == [2, 2, 1, 1]
    shown = [dict(zip(speed.columns, cells, strict=True)) for cells in speed.rows]
    assert [cells["of limit"] for cells in shown] == ["–", "50%"]
    assert shown[0]["times as fast"] == "1.00 (0.90–1.10)"
    bytes_ = [dict(zip(moved.columns, cells, strict=True)) for cells in moved.rows]
    assert [cells["from disk"] for cells in bytes_] == ["–", "2 KiB"]
    assert "10% in host memory" in others[0].title


def test_figures_have_a_curve_per_contender_and_leave_out_what_is_unknown() -> None:
    rows = [make_row(num_tokens=n, contender=c) for n in (512, 1024) for c in ("dense", "exact")]
    rows.append(make_row(contender="adaptive", limit_share=0.25))
    times, limits = bench_figures(rows)
    assert times.curves["dense"] == [(512, 10.0), (1024, 10.0)]
    assert set(times.curves) == {"dense", "exact", "adaptive"}
    assert limits.curves == {"adaptive": [(512, 0.25)]}
