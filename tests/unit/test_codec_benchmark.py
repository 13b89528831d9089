"""The benchmark of codecs in a small size: it measures what it says."""

from itertools import pairwise

import pytest

from benchmarks.codecs import main, measure, parametric_heads, show
from offload.tiers.codec_ladder import CODECS


def test_benchmark_orders_codecs_by_size_and_by_error(capsys: pytest.CaptureFixture[str]) -> None:
    heads = list(parametric_heads(128, 8, 1))
    rows = [measure("parametric", name, codec, heads, 1) for name, codec in CODECS.items()]
    found = {row.codec: row for row in rows}
    exact, coarse = (
        [found["raw"], found["bf16x"]],
        [found[name] for name in ("int8", "kivi4", "kivi2")],
    )
    assert all(row.key_error == row.value_error == row.output_error_p95 == 0 for row in exact)
    for finer, coarser in pairwise(coarse):
        assert 0 < finer.key_error < coarser.key_error < 1
        assert 0 < finer.output_error_median < coarser.output_error_median < 1
        assert 1 < finer.ratio < coarser.ratio
    assert found["raw"].ratio == 1 < found["bf16x"].ratio
    assert all(min(row.encode_gb_s, row.decode_gb_s) > 0 for row in rows)
    show(rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in CODECS)


def test_benchmark_refuses_tokens_that_are_no_whole_units(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--tokens", "100"])
    assert "100 is no multiple of 64" in capsys.readouterr().err
