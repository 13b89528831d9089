"""A few seconds of live streams through ``offload video encode``: benchmarks.video_live, short."""

import pytest

pytest.importorskip("av")


def test_live_streams_lose_nothing_unseen() -> None:
    from benchmarks.video_live import measure

    steady, damaged, fast = measure(minutes=0.04, rate=30)
    assert steady.sent == steady.decoded == steady.encoded == 72
    assert (steady.dropped, steady.corrupt, steady.reconnects) == (0, 0, 3)
    assert 0 < damaged.encoded < damaged.sent
    assert damaged.corrupt > 0
    assert fast.decoded == fast.encoded + fast.dropped
    assert fast.dropped == 0 or "drop_oldest" in fast.announced
