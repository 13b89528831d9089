import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, TransferError, TransferTimeout
from offload.video.live_connection import Address, Connection
from offload.video.live_queue import LiveQueue, Policy
from offload.video.sampling import Sampler
from offload.video.source import Source
from offload.video.sources import open_source
from offload.video.types import Frame
from tests.support.live_video import Camera, publisher
from tests.support.video_files import every, flip_bytes, read_number, write_video

pytestmark = pytest.mark.leaks

_PERIOD_S = 0.1
_NUM_FRAMES = 30
_WAIT_S = 20.0


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two videos; the numbers in the frames of the second follow those of the first."""
    folder = tmp_path_factory.mktemp("videos")
    return [
        write_video(folder / f"{k}.ts", every(_PERIOD_S, _NUM_FRAMES), first_number=k * _NUM_FRAMES)
        for k in (0, 1)
    ]


@pytest.fixture
def camera() -> Iterator[Camera]:
    with Camera() as camera:
        yield camera


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Serve the directory of the test from a process of its own."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        yield f"http://127.0.0.1:{port}"
        server.kill()


def _numbers(source: Source) -> list[int]:
    return [read_number(frame.image) for frame in source]


def _await_end_of_stream() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("offload-video"):
            thread.join(_WAIT_S)
            assert not thread.is_alive()


class _CountingQueue(LiveQueue):
    num_beats = 0

    def beat(self) -> None:
        self.num_beats += 1
        super().beat()


def _next_after_silence(source: Source) -> Frame:
    while True:
        with contextlib.suppress(TransferTimeout):
            return next(source)


def test_live_stream_whose_sender_closes_it_loses_no_frame(
    camera: Camera, videos: list[Path]
) -> None:
    with open_source(camera.url, reconnect=0) as source:
        camera.accept()
        camera.send(videos[0])
        camera.hang_up()
        frames = list(source)

    assert [read_number(frame.image) for frame in frames] == list(range(_NUM_FRAMES))
    assert [frame.time_s for frame in frames] == pytest.approx(every(_PERIOD_S, _NUM_FRAMES))
    assert source.stats.gaps == []
    assert source.duration_s is None


def test_live_stream_is_sampled_by_its_times(camera: Camera, videos: list[Path]) -> None:
    with open_source(camera.url, fps=1, reconnect=0) as source:
        camera.accept()
        camera.send(videos[0])
        camera.hang_up()
        assert _numbers(source) == [0, 10, 20]

    assert (source.stats.decoded, source.stats.skipped) == (_NUM_FRAMES, _NUM_FRAMES - 3)


@pytest.mark.parametrize("is_broken", [False, True])
def test_live_stream_that_was_lost_goes_on_after_a_gap(
    camera: Camera, videos: list[Path], is_broken: bool
) -> None:
    start_s = time.monotonic()
    with open_source(camera.url, reconnect=2) as source:
        camera.accept()
        camera.send(videos[0])
        before = [next(source)]
        if is_broken:
            before += [next(source) for _ in range(_NUM_FRAMES // 2)]
            camera.break_off()
        else:
            camera.hang_up()
        camera.accept()
        camera.send(videos[1])
        camera.hang_up()
        camera.go_away()
        frames = before + list(source)

    numbers = [read_number(frame.image) for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-_NUM_FRAMES:] == list(range(_NUM_FRAMES, 2 * _NUM_FRAMES))
    assert is_broken or numbers[:_NUM_FRAMES] == list(range(_NUM_FRAMES))
    times_s = [frame.time_s for frame in frames]
    assert times_s == sorted(times_s)
    assert np.diff(times_s[-_NUM_FRAMES:]) == pytest.approx(_PERIOD_S)
    assert source.stats.reconnects == len(source.stats.gaps) == 1
    gap = source.stats.gaps[0]
    assert (gap.start_s, gap.end_s) == (times_s[-_NUM_FRAMES - 1], times_s[-_NUM_FRAMES])
    assert 0 < gap.end_s - gap.start_s < time.monotonic() - start_s
    assert source.stats.wall_s(gap.end_s) == gap.wall_end_s
    assert ("reset" in gap.reason) == is_broken


def test_live_stream_that_ends_again_at_once_is_not_asked_for_ever(
    camera: Camera, videos: list[Path]
) -> None:
    with open_source(camera.url, reconnect=2) as source:
        for _ in range(3):
            camera.accept()
            camera.send(videos[0])
            camera.hang_up()
        numbers = _numbers(source)

    assert numbers == list(range(_NUM_FRAMES)) * 3
    assert source.stats.reconnects == 2


@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_recording_over_http_ends_where_it_ends(
    web_server: str, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / f"video{suffix}", every(_PERIOD_S, _NUM_FRAMES))

    with open_source(f"{web_server}/video{suffix}") as source, caplog.at_level(logging.INFO):
        assert _numbers(source) == list(range(_NUM_FRAMES))

    assert source.stats.reconnects == 0
    assert caplog.text == ""


@pytest.mark.parametrize("is_complete", [True, False])
def test_live_stream_that_has_become_a_recording_is_not_played_again(
    camera: Camera, videos: list[Path], tmp_path: Path, is_complete: bool
) -> None:
    video = videos[0].read_bytes()
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(video), video)
    # Nothing says where this one ends, so that libav takes the end for a failure.
    endless = b"Connection: close\r\n\r\n%b" % video
    recording = b"Content-Length: %d\r\n\r\n%b" % (len(video), video)
    ok = b"HTTP/1.1 200 OK\r\n"
    (tmp_path / "live").write_bytes(ok + (chunked if is_complete else endless))
    (tmp_path / "recording").write_bytes(ok + recording)
    broken = pytest.raises(TransferError, match=r"/video.ts: Input/output error \(30 frames")

    with open_source(f"{camera.url}/video.ts".replace("tcp", "http")) as source:
        for name in ("live", "recording"):
            camera.accept()
            camera.send(tmp_path / name)
            camera.hang_up()
        numbers = [read_number(next(source).image) for _ in range(_NUM_FRAMES)]
        with contextlib.nullcontext() if is_complete else broken:
            assert _numbers(source) == []

    assert numbers == list(range(_NUM_FRAMES))


def test_live_stream_is_alive_while_its_frames_are_not_needed(
    camera: Camera, videos: list[Path]
) -> None:
    connection = Connection(Address("test", camera.url), Sampler(1), timeout_s=10, reconnect=0)
    queue = _CountingQueue("test", connection.stats)
    camera.accept()
    camera.send(videos[0])
    camera.hang_up()

    connection.run(queue)

    assert connection.stats.skipped == _NUM_FRAMES - 3
    assert queue.num_beats >= _NUM_FRAMES


def test_rtsp_stream_loses_no_frame(videos: list[Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"rtsp://127.0.0.1:{free.getsockname()[1]}/live"
    listening = {"rtsp_flags": "listen", "listen_timeout": "10"}

    with (
        open_source(url, reconnect=0, timeout_s=20.0, options=listening) as source,
        publisher(videos[0], url),
    ):
        frames = list(source)

    assert [read_number(frame.image) for frame in frames] == list(range(_NUM_FRAMES))
    # RTSP does not tell the time of the first frame until it has seen the second.
    steps_s = np.diff([frame.time_s for frame in frames[1:]])
    assert steps_s == pytest.approx(_PERIOD_S, abs=1e-3)


def test_live_stream_that_is_closed_early_accounts_for_every_frame(
    camera: Camera, videos: list[Path]
) -> None:
    with open_source(camera.url, fps=5, queue_frames=4) as source:
        camera.accept()
        camera.send(videos[0])
        next(source)

    stats = source.stats
    assert stats.yielded == 1
    assert stats.decoded == stats.skipped + stats.dropped + stats.yielded


def test_live_stream_that_stays_away_after_a_failure_is_an_error(
    camera: Camera, videos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with open_source(camera.url, reconnect=1) as source, caplog.at_level(logging.WARNING):
        camera.accept()
        camera.send(videos[0])
        next(source)
        camera.go_away()
        camera.break_off()
        with pytest.raises(TransferError, match=rf"{camera.url}: .* frames before, 1 attempts"):
            list(source)

    assert "attempt 1 of 1 to connect again" in caplog.text


def test_live_stream_that_is_not_there_is_an_error_without_its_password(camera: Camera) -> None:
    camera.go_away()
    url = camera.url.replace("//", "//me:secret@")

    with (
        open_source(url, reconnect=1) as source,
        pytest.raises(
            TransferError, match=r"tcp://me:\*\*\*@127.0.0.1:\d+: .*\(0 frames"
        ) as caught,
    ):
        next(source)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("block", range(_NUM_FRAMES)),
        ("drop_oldest", range(_NUM_FRAMES - 4, _NUM_FRAMES)),
        ("drop_newest", range(4)),
    ],
)
def test_live_stream_with_a_slow_consumer_keeps_to_its_policy(
    camera: Camera, videos: list[Path], policy: Policy, kept: range
) -> None:
    with open_source(camera.url, policy=policy, queue_frames=4, reconnect=0) as source:
        camera.accept()
        camera.send(videos[0])
        camera.hang_up()
        if policy != "block":
            _await_end_of_stream()
        assert _numbers(source) == list(kept)

    assert source.stats.dropped == _NUM_FRAMES - len(kept)
    assert source.stats.decoded == _NUM_FRAMES


def test_live_stream_that_falls_silent_times_out_and_comes_back(
    camera: Camera, videos: list[Path]
) -> None:
    with open_source(camera.url, timeout_s=1.0) as source:
        camera.accept()
        camera.send(videos[0])
        before = [next(source) for _ in range(_NUM_FRAMES)]
        with pytest.raises(TransferTimeout, match=f"{camera.url}: no frame for 1.0 s"):
            next(source)
        camera.serve(videos[1])
        after = _next_after_silence(source)

    assert [read_number(frame.image) for frame in before] == list(range(_NUM_FRAMES))
    assert read_number(after.image) == _NUM_FRAMES
    times_s = [frame.time_s for frame in before]
    assert times_s == pytest.approx(every(_PERIOD_S, _NUM_FRAMES))
    assert after.time_s > times_s[-1]


def test_live_stream_with_damage_leaves_out_and_counts_those_frames(
    camera: Camera, tmp_path: Path
) -> None:
    video = write_video(tmp_path / "video.ts", every(_PERIOD_S, 60))
    with open_source(camera.url, reconnect=0) as source:
        camera.accept()
        camera.send(flip_bytes(video, 0.4, 0.6, 50))
        camera.hang_up()
        numbers = _numbers(source)

    assert source.stats.corrupt > 0
    assert 40 < len(numbers) < 60
    assert numbers[-10:] == list(range(50, 60))


def test_live_stream_that_is_closed_in_a_read_ends_its_thread_in_time(
    camera: Camera, videos: list[Path]
) -> None:
    source = open_source(camera.url, timeout_s=1.0)
    camera.accept()
    camera.send(videos[0])
    list(zip(range(_NUM_FRAMES), source, strict=False))

    start_s = time.monotonic()
    source.close()

    assert time.monotonic() - start_s < 1.0
    with pytest.raises(ClosedError):
        next(source)


def test_live_stream_that_is_closed_by_another_thread_frees_its_consumer(camera: Camera) -> None:
    source = open_source(camera.url, timeout_s=1.0)
    camera.accept()
    closing = threading.Thread(target=source.close)

    closing.start()
    with pytest.raises(ClosedError):
        next(source)

    closing.join(_WAIT_S)
    assert not closing.is_alive()
