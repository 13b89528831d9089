"""Traces in Mooncake's format: read, written, synthetic."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bench.sim_trace import Trace, TraceRequest, read_trace, write_trace
from offload.bench.sim_workload import Workload, synthesize
from offload.errors import ConfigError

LINE = '{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'


def read_text(folder: Path, text: str, block_tokens: int = 512) -> Trace:
    path = folder / "trace.jsonl"
    path.write_text(text)
    return read_trace(path, block_tokens)


def test_trace_of_one_line_of_mooncakes_format_is_read(tmp_path: Path) -> None:
    expected = TraceRequest(1.5, 600, 5, (1, 2), 0)
    assert read_text(tmp_path, LINE + "\n\n").requests == (expected,)


def test_trace_without_sessions_joins_prompts_that_go_on_from_another(tmp_path: Path) -> None:
    # 7 is the shared system prompt; only the third line goes on from a whole earlier prompt.
    blocks = ["[7, 1, 2]", "[7, 3, 4]", "[7, 1, 5, 6]"]
    lengths = [1030, 1030, 1600]
    lines = [
        f'{{"timestamp": {i}, "input_length": {n}, "output_length": 9, "hash_ids": {ids}}}'
        for i, (ids, n) in enumerate(zip(blocks, lengths, strict=True))
    ]
    found = read_text(tmp_path, "\n".join(lines))
    assert [each.session for each in found.requests] == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("nonsense", "trace.jsonl:1"),
        (LINE + "\n[1]", "trace.jsonl:2"),
        (LINE.replace("600", "512"), "1 blocks of 512"),
        (LINE.replace("600", "0"), "0 tokens in"),
        (LINE.replace("[1, 2]", '["a", 2]'), "not a request"),
    ],
)
def test_trace_of_another_format_is_refused_with_the_line(
    tmp_path: Path, text: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        read_text(tmp_path, text)


def test_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none")


def test_trace_that_was_written_is_read_back(tmp_path: Path) -> None:
    trace = synthesize(Workload(sessions=20), seed=3)
    write_trace(tmp_path / "t", trace)
    found = read_trace(tmp_path / "t")
    assert [each.block_ids for each in found.requests] == [e.block_ids for e in trace.requests]
    assert [each.session for each in found.requests] == [e.session for e in trace.requests]
    times = [each.arrival_s for each in found.requests]
    assert times == pytest.approx([each.arrival_s for each in trace.requests], abs=1e-6)


def test_blocks_that_are_kept_are_those_that_the_next_prompt_begins_with() -> None:
    first = TraceRequest(0.0, 20, 14, (0, 1, 2), 0)
    second = TraceRequest(1.0, 50, 5, (0, 1, 3, 4, 5, 6, 7), 0)
    assert Trace((first, second), 8).kept_ids() == [(0, 1, 3, 4), (0, 1, 3, 4, 5, 6)]


@given(seed=st.integers(0, 1000), block_tokens=st.sampled_from([16, 64, 512]))
@settings(max_examples=20, deadline=None)
def test_synthetic_trace_has_turns_that_go_on_from_the_last(seed: int, block_tokens: int) -> None:
    trace = synthesize(Workload(sessions=10, max_tokens=20_000), seed, block_tokens)
    last: dict[int, TraceRequest] = {}
    for each in trace.requests:
        before = last.get(each.session)
        if before is not None:
            whole = before.input_tokens // block_tokens
            assert each.block_ids[:whole] == before.block_ids[:whole]
            assert each.input_tokens > before.input_tokens + before.output_tokens
            assert each.arrival_s >= before.arrival_s
        assert len(each.block_ids) == -(-each.input_tokens // block_tokens)
        assert each.input_tokens + each.output_tokens <= 20_000
        last[each.session] = each
    assert trace == synthesize(Workload(sessions=10, max_tokens=20_000), seed, block_tokens)


@pytest.mark.parametrize("change", [{"turns": 0.5}, {"think_s": 0.0}, {"system_prompts": 0}])
def test_workload_of_impossible_numbers_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Workload(**change)  # type: ignore[arg-type]


def test_denser_trace_keeps_pauses_and_faster_one_shrinks_them() -> None:
    requests = (TraceRequest(10.0, 8, 1, (0,), 0), TraceRequest(14.0, 16, 1, (0, 1), 0))
    trace = Trace(requests, 8)
    assert [each.arrival_s for each in trace.denser(2.0).requests] == [5.0, 9.0]
    assert [each.arrival_s for each in trace.faster(2.0).requests] == [5.0, 7.0]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_trace_at_an_impossible_load_is_refused(factor: float) -> None:
    with pytest.raises(ConfigError, match="times its load"):
        Trace((), 8).denser(factor)
