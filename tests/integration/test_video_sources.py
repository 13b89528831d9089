import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from offload.errors import ClosedError, ConfigError
from offload.video import decoding
from offload.video.source import Source
from offload.video.sources import open_source
from tests.support.video_files import (
    every,
    flip_bytes,
    numbered_picture,
    read_number,
    truncate,
    turn_clockwise,
    write_video,
)

pytestmark = pytest.mark.leaks

_PERIOD_S = 0.1


def _seen(source: Source) -> list[tuple[int, float]]:
    return [(read_number(frame.image), round(frame.time_s, 6)) for frame in source]


def _numbers(source: Source) -> list[int]:
    return [read_number(frame.image) for frame in source]


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv", ".flv"])
def test_file_of_any_container_gives_every_frame_with_its_time(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"video{suffix}", every(_PERIOD_S, 30))

    with open_source(path) as source:
        assert source.duration_s == pytest.approx(3.0, abs=0.25)
        assert _seen(source) == [(k, round(k * _PERIOD_S, 6)) for k in range(30)]
        assert (source.stats.decoded, source.stats.yielded, source.stats.corrupt) == (30, 30, 0)


def test_file_without_timestamps_is_timed_by_its_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.h264", every(_PERIOD_S, 10))

    with open_source(path) as source:
        frames = _seen(source)

    assert [number for number, _ in frames] == list(range(10))
    steps_s = np.diff([time_s for _, time_s in frames])
    assert steps_s == pytest.approx(steps_s[0])
    assert steps_s[0] > 0


@pytest.mark.parametrize(
    ("times_s", "fps", "taken"),
    [
        pytest.param(every(_PERIOD_S, 40), 1, [0, 10, 20, 30], id="one per second"),
        pytest.param(every(0.4, 6), 1, [0, 3, 5], id="rates that do not divide"),
        pytest.param(every(0.4, 6), 60, [0, 1, 2, 3, 4, 5], id="more than there are"),
        pytest.param([0, 0.1, 0.2, 2.5, 2.6, 7.0, 7.5, 8.0], 1, [0, 3, 5, 7], id="varying rate"),
    ],
)
def test_file_is_sampled_by_the_times_of_its_frames(
    tmp_path: Path, times_s: list[float], fps: float, taken: list[int]
) -> None:
    path = write_video(tmp_path / "video.mp4", times_s)

    with open_source(path, fps=fps) as source:
        assert _seen(source) == [(k, round(times_s[k], 6)) for k in taken]
        assert source.stats.skipped == len(times_s) - len(taken)


@pytest.mark.parametrize("size", [(65, 33), (64, 49), (321, 17)])
def test_file_of_odd_size_gives_frames_of_just_that_size(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    path = write_video(tmp_path / "v.mp4", every(1, 3), size=size, pixel_format="yuv444p")

    with open_source(path) as source:
        images = [frame.image for frame in source]

    assert {image.shape for image in images} == {(size[1], size[0], 3)}
    assert [read_number(image) for image in images] == [0, 1, 2]


def test_file_that_was_filmed_upright_gives_turned_frames(tmp_path: Path) -> None:
    path = turn_clockwise(write_video(tmp_path / "v.mp4", every(1, 2), first_number=1))

    with open_source(path) as source:
        image = next(source).image

    assert image.shape == (64, 48, 3)
    np.testing.assert_allclose(image, np.rot90(numbered_picture(1), -1), atol=60)


def test_file_of_two_recordings_in_a_row_has_one_timeline(tmp_path: Path) -> None:
    halves = [
        write_video(tmp_path / f"{k}.ts", every(_PERIOD_S, 10), first_number=10 * k) for k in (0, 1)
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(half.read_bytes() for half in halves))

    with open_source(path) as source:
        frames = _seen(source)

    assert [number for number, _ in frames] == list(range(20))
    assert [time_s for _, time_s in frames] == pytest.approx(every(_PERIOD_S, 20))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_file_that_is_cut_off_gives_what_is_there_and_says_so(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = truncate(write_video(tmp_path / f"video{suffix}", every(_PERIOD_S, 60)), 0.6)

    with open_source(path) as source, caplog.at_level(logging.WARNING):
        numbers = _numbers(source)

    assert 25 < len(numbers) < 40
    assert numbers == sorted(set(numbers))
    # A transport stream has no header that could promise more, but its last packet is cut.
    assert "of 6.0 s" in caplog.text or source.stats.corrupt == 1


@pytest.mark.parametrize("count", [20, 200])
def test_file_with_damage_in_the_middle_leaves_out_and_counts_those_frames(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    video = write_video(tmp_path / "video.mp4", every(_PERIOD_S, 60))
    path = flip_bytes(video, 0.4, 0.6, count)

    with open_source(path) as source, caplog.at_level(logging.WARNING):
        frames = _seen(source)

    numbers = [number for number, _ in frames]
    assert source.stats.corrupt > 0
    # Of damaged neighbours libav's threads may report fewer than they lose, as it happens.
    assert 48 <= len(frames) + source.stats.corrupt <= 60
    assert numbers[:20] == list(range(20))
    assert numbers[-10:] == list(range(50, 60))
    times_s = [time_s for _, time_s in frames]
    assert times_s == sorted(times_s)
    assert f"left out {source.stats.corrupt} damaged frames" in caplog.text


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".h264"])
def test_file_with_damage_all_over_still_ends(tmp_path: Path, suffix: str) -> None:
    video = write_video(tmp_path / f"video{suffix}", every(_PERIOD_S, 60))
    path = flip_bytes(video, 0.1, 1.0, 2000)

    with open_source(path) as source:
        frames = _seen(source)

    assert source.stats.corrupt > 0
    assert len(frames) == source.stats.decoded < 60
    assert [time_s for _, time_s in frames] == sorted(time_s for _, time_s in frames)


def test_file_without_a_frame_that_can_be_decoded_is_an_error(tmp_path: Path) -> None:
    path = truncate(write_video(tmp_path / "video.mp4", every(_PERIOD_S, 60)), 0.06)

    with open_source(path) as source, pytest.raises(OSError, match="not one frame in it"):
        next(source)


def test_file_decodes_as_it_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", every(_PERIOD_S, 200))

    with open_source(path, fps=1) as source:
        next(source)
        assert source.stats.decoded == 1
        next(source)
        assert source.stats.decoded == 11


def test_file_that_is_closed_leaves_neither_decoders_nor_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", every(_PERIOD_S, 20))
    threads = len(os.listdir("/proc/self/task"))

    source = open_source(path)
    next(source)
    source.close()
    source.close()

    assert len(os.listdir("/proc/self/task")) == threads
    with pytest.raises(ClosedError, match=r"video\.mp4"):
        next(source)


def test_file_that_fails_again_and_again_while_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario: a demuxer that does not get past what it cannot read."""
    path = write_video(tmp_path / "video.mp4", every(_PERIOD_S, 5))
    monkeypatch.setattr(decoding, "_MAX_FAILED_READS", 3)
    really_open = av.open

    class Stuck:
        def __init__(self, *_: Any, **__: Any) -> None:
            self._container = really_open(str(path))
            self.streams = self._container.streams
            self.duration = self._container.duration
            self.close = self._container.close

        def demux(self, _: object) -> None:
            raise av.InvalidDataError(1, "bad")

    monkeypatch.setattr(av, "open", Stuck)
    with (
        open_source(path) as source,
        pytest.raises(OSError, match=r"video.mp4, after 0 .* 3 reads"),
    ):
        next(source)


def test_realtime_file_gives_every_frame_and_knows_the_wall_clock(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", every(0.004, 10))

    with open_source(path, realtime=True) as source:
        assert _numbers(source) == list(range(10))
        assert source.duration_s == pytest.approx(0.04, abs=0.1)
        start_s = source.stats.wall_s(0.0)
        assert start_s is not None
        assert source.stats.wall_s(5.0) == start_s + 5.0


def test_realtime_file_that_is_closed_early_ends_its_thread(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mp4", every(1000.0, 3))

    with open_source(path, realtime=True) as source:
        assert read_number(next(source).image) == 0

    assert not [t for t in threading.enumerate() if t.name.startswith("offload-video")]
    stats = source.stats
    assert stats.decoded == stats.skipped + stats.dropped + stats.yielded


def _empty(folder: Path) -> str:
    (folder / "empty.mp4").touch()
    return str(folder / "empty.mp4")


def _text(folder: Path) -> str:
    (folder / "text.mp4").write_text("hello " * 100)
    return str(folder / "text.mp4")


def _cut_header(folder: Path) -> str:
    return str(truncate(write_video(folder / "cut.mp4", every(1, 5)), 0.01))


def _sound(folder: Path) -> str:
    with av.open(str(folder / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return str(folder / "sound.wav")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda _: "nowhere.mp4", "no such file", id="missing"),
        pytest.param(_empty, r"empty file \(0 bytes\)", id="empty"),
        pytest.param(_text, "text.mp4 cannot be read as a video: Invalid data", id="text"),
        pytest.param(_cut_header, "cut.mp4 cannot be read as a video", id="no header"),
        pytest.param(_sound, "no video stream in it, only: audio", id="sound"),
        pytest.param(lambda _: "webcam:987", "there is no /dev/video987; webcams", id="webcam"),
        pytest.param(lambda _: "webcam:/dev/nothing", "there is no /dev/nothing", id="device"),
        pytest.param(lambda _: "gopher://host/video", "gopher is none of the", id="scheme"),
    ],
)
def test_source_that_is_no_video_is_refused_at_once(
    tmp_path: Path, make: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(make(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"picture_fps": -1}, "picture_fps is -1"),
        ({"policy": "drop"}, "policy is 'drop'"),
        ({"queue_frames": 0}, "queue_frames is 0"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"reconnect": -1}, "reconnect is -1"),
    ],
)
def test_source_with_settings_that_make_no_sense_is_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source("tcp://127.0.0.1:9", **settings)


def test_video_without_pyav_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "video.mp4", every(1, 2))
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(ConfigError, match=r"pip install 'kv-offload\[video\]'"):
        open_source(path)
