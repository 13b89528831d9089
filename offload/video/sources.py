"""Opens whatever holds frames: a file, a folder of pictures, an array, a camera, an address."""

import glob
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from offload.errors import ConfigError
from offload.video.live_connection import Address, Connection
from offload.video.live_pacing import Pacing
from offload.video.live_queue import LiveQueue, Policy, check_queue
from offload.video.sampling import Sampler, check_rate
from offload.video.source import Source
from offload.video.source_array import ArrayFile
from offload.video.source_file import VideoFile
from offload.video.source_live import Feed, LiveSource
from offload.video.source_pictures import PICTURE_SUFFIXES, Pictures

SCHEMES = frozenset({"http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "srt", "tcp", "udp"})
"""Of addresses of live streams. HLS is http."""

_ARRAY_FPS = 1.0
"""Of the RVS benchmark."""


def open_source(
    spec: str | Path,
    *,
    fps: float | None = None,
    picture_fps: float | None = None,
    realtime: bool = False,
    policy: Policy = "block",
    queue_frames: int = 64,
    timeout_s: float = 10.0,
    reconnect: int = 5,
    options: Mapping[str, str] | None = None,
) -> Source:
    """Open a source of frames; ``docs/video-sources.md`` tells more.

    Parameters
    ----------
    spec : str or Path
        A video file; a folder of pictures, or a pattern like ``frames/*.png``; a ``.npy`` file;
        ``webcam:0`` or ``webcam:/dev/video0``; an address such as ``rtsp://…``.
    fps : float, optional
        Frames to take per second of the stream, the first at or after each time ``k / fps``.
        Default: every frame.
    picture_fps : float, optional
        How many pictures, or frames of an array, are one second. Pictures: default ``fps``, and
        without that the times of modification. Arrays: default 1.
    realtime : bool
        Play a recording at its own speed, through the queue of live sources.
    policy : {"block", "drop_oldest", "drop_newest"}
        Live: what happens to a frame that finds the queue full.
    queue_frames : int
        Live: decoded frames that may wait, ``height * width * 3`` bytes each.
    timeout_s : float
        Live: longest time without a frame before that is an error.
    reconnect : int
        Live: attempts in a row to replace a lost connection. 0: a loss is the end.
    options : dict of str to str, optional
        Live: passed to libav, such as ``{"video_size": "1280x720"}`` for a webcam.

    Returns
    -------
    Source
        A live one decodes from now on, on its own thread, and must be closed; it tells only when
        iterated that it cannot connect.

    Raises
    ------
    ConfigError
        There is no such thing, it cannot be read, or a parameter makes no sense.
    """
    sampler = Sampler(fps)
    check_rate("picture_fps", picture_fps)
    check_queue(policy, queue_frames)
    address = _parse_address(str(spec), options or {})
    feed: Feed
    if address is not None:
        feed = Connection(address, sampler, timeout_s=timeout_s, reconnect=reconnect)
        name = address.name
    else:
        recording = _open_recording(spec, sampler, picture_fps)
        if not realtime:
            return recording
        feed = Pacing(recording)
        name = recording.name
    return LiveSource(name, feed, LiveQueue(name, feed.stats, policy, queue_frames))


def _open_recording(spec: str | Path, sampler: Sampler, picture_fps: float | None) -> Source:
    path = Path(spec)
    if path.is_dir():
        return Pictures(str(spec), sorted(path.iterdir()), picture_fps or sampler.fps, sampler)
    if path.exists():
        suffix = path.suffix.lower()
        if suffix == ".npy":
            return ArrayFile(path, picture_fps or _ARRAY_FPS, sampler)
        if suffix in PICTURE_SUFFIXES:
            return Pictures(str(spec), [path], picture_fps or sampler.fps, sampler)
        return VideoFile(path, sampler)
    if not glob.has_magic(str(spec)):
        raise ConfigError(f"{spec}: there is no such file or folder, and it is no address")
    paths = [Path(match) for match in glob.glob(str(spec), recursive=True)]
    return Pictures(str(spec), paths, picture_fps or sampler.fps, sampler)


def _parse_address(spec: str, options: Mapping[str, str]) -> Address | None:
    kind, separator, rest = spec.partition(":")
    if kind == "webcam" and separator:
        return _parse_webcam(spec, rest or "0", options)
    if not rest.startswith("//"):
        return None
    if kind not in SCHEMES:
        raise ConfigError(
            f"{spec}: {kind} is none of the known schemes ({', '.join(sorted(SCHEMES))})"
        )
    if kind in ("rtsp", "rtsps"):
        # Over UDP, its default, a lost datagram is a broken picture.
        options = {"rtsp_transport": "tcp", **options}
    return Address(_without_password(spec), spec, options=options)


def _parse_webcam(spec: str, device: str, options: Mapping[str, str]) -> Address:
    if sys.platform != "linux":
        raise ConfigError(f"{spec}: webcams are read by v4l2, which {sys.platform} does not have")
    path = Path(f"/dev/video{device}" if device.isdecimal() else device)
    if not path.exists():
        found = ", ".join(sorted(str(other) for other in Path("/dev").glob("video*"))) or "none"
        raise ConfigError(f"{spec}: there is no {path}; webcams found: {found}")
    return Address(spec, str(path), "v4l2", options)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{host}"))
