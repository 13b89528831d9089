"""Streams of every kind of model are saved, loaded, and go on as if nothing had been."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.sessions.store import SessionStore
from offload.video.encoder import StreamEncoder
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
from tests.support.tiny_video_models import make_frames, tiny_adapter

OPTIONS: dict[str, Any] = {
    "tiers": ["gpu", "disk"],
    "capacity": {"gpu": "512KiB", "disk": "64MiB"},
}


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl"])
def test_stream_that_was_loaded_goes_on_like_one_that_was_not_interrupted(
    name: str, tmp_path: Path
) -> None:
    adapter, frames = tiny_adapter(name), make_frames(12)
    with SessionStore(tmp_path / "root") as store:
        whole = VideoStream(adapter, **OPTIONS, disk_path=tmp_path / "a")
        with closing(StreamSession(whole, "lobby", store)) as session:
            encoder = StreamEncoder(whole, 40)
            encoder.add(frames[:6])
            session.save()
            encoder.add(frames[6:])
            loaded = StreamSession.load(adapter, "lobby", store, **OPTIONS, disk_path=tmp_path)
            with closing(loaded):
                again = loaded.stream
                assert [place.time_s for place in again.units.places] == [
                    place.time_s for place in whole.units.places[: len(again.units.places)]
                ]
                StreamEncoder(again, 40).add(frames[6:])
                for one, other in zip(again.units.places, whole.units.places, strict=True):
                    assert torch.equal(one.positions, other.positions)
                    assert (one.start, one.step, one.complete_s) == (
                        other.start,
                        other.step,
                        other.complete_s,
                    )
                everything = [range(whole.store.num_tokens)]
                for layer in range(whole.store.num_layers):
                    found, expected = (
                        each.store.read(layer, everything) for each in (again, whole)
                    )
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                    means = (each.means(layer, len(whole.units.places)) for each in (again, whole))
                    torch.testing.assert_close(*means, atol=1e-5, rtol=1e-5)
