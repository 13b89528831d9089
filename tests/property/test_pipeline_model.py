"""The cost model against a simulation that moves chunks over throttled tiers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.prefetch.pipeline import CodecCost, Links, layer_seconds, stage_times, total_seconds
from offload.prefetch.pipeline_plan import best_share
from tests.support.pipeline_sim import LAYOUT, Chunks, PipelineSim

NUM_LAYERS, NUM_SKIPPED, NUM_MEASURED = 36, 12, 18
"""The measured ones are a multiple of every number of layers ahead, which bursts repeat after."""

MIB = float(1 << 20)
COUNTS = st.integers(0, 8)
CHUNKS = st.builds(Chunks, raw=COUNTS, encoded=COUNTS, host=COUNTS)
LINKS = st.builds(
    Links,
    disk_bytes_per_s=st.floats(0.1 * MIB, 10 * MIB),
    read_s=st.just(0.0) | st.floats(1e-5, 1e-3),
    bus_bytes_per_s=st.floats(0.1 * MIB, 30 * MIB),
    is_shared=st.booleans(),
)
CODECS = st.builds(
    CodecCost,
    name=st.just("some"),
    ratio=st.sampled_from([1.25, 2.0, 3.2]),
    decode_bytes_per_s=st.floats(0.3 * MIB, 100 * MIB),
    decodes_on=st.sampled_from(["host", "device"]),
)


@given(
    chunks=CHUNKS,
    links=LINKS,
    codec=CODECS,
    compute_s=st.floats(3e-4, 3e-2),
    layers_ahead=st.integers(1, 4),
)
def test_model_agrees_with_the_simulation(
    chunks: Chunks, links: Links, codec: CodecCost, compute_s: float, layers_ahead: int
) -> None:
    work = chunks.work(compute_s, layers_ahead)
    spans = PipelineSim(chunks, work, links, codec).run(NUM_LAYERS)
    measured = spans[NUM_SKIPPED : NUM_SKIPPED + NUM_MEASURED + 1]
    layer_s = (measured[-1].begin_s - measured[0].begin_s) / NUM_MEASURED
    assert layer_s == pytest.approx(layer_seconds(work, links, codec, chunks.share), rel=0.1)
    total_s = total_seconds(work, links, NUM_LAYERS, codec, chunks.share)
    assert spans[-1].end_s == pytest.approx(total_s, rel=0.1)
    fill_s = stage_times(work, links, codec, chunks.share).before_s
    assert spans[0].begin_s == pytest.approx(fill_s, rel=0.1)


@given(links=LINKS, codec=CODECS, compute_s=st.floats(3e-4, 3e-2), num_chunks=st.integers(1, 12))
def test_best_share_is_the_best_of_all_simulated_ones(
    links: Links, codec: CodecCost, compute_s: float, num_chunks: int
) -> None:
    def simulated_s(encoded: int) -> float:
        chunks = Chunks(num_chunks - encoded, encoded, 0)
        sim = PipelineSim(chunks, chunks.work(compute_s, 2), links, codec)
        return sim.run(NUM_LAYERS)[-1].end_s / NUM_LAYERS

    work = Chunks(num_chunks, 0, 0).work(compute_s, 2)
    planned_s = layer_seconds(work, links, codec, best_share(work, links, codec))
    least_s = min(simulated_s(encoded) for encoded in range(num_chunks + 1))
    # Whole chunks and the first layer keep the simulation above the plan, but nothing below it.
    assert planned_s <= 1.01 * least_s


def test_reads_that_cost_more_than_their_bytes_are_seen_in_the_simulation() -> None:
    chunks = Chunks(8, 0, 0)
    links = Links(1000 * MIB, 1e-3, 1000 * MIB)
    spans = PipelineSim(chunks, chunks.work(1e-4, 2), links, CodecCost("none", 1.0, MIB)).run(10)
    by_hand_s = 8 * (1e-3 + LAYOUT.slot_bytes / (1000 * MIB))
    assert spans[-1].begin_s - spans[-2].begin_s == pytest.approx(by_hand_s)
