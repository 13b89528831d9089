"""Small real videos, whose frames tell their own number."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from offload.video.types import Image

_NUM_BITS = 8
_TICKS_PER_S = 90_000
_QUARTER_TURN_CLOCKWISE = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
"""The matrix of a telephone held upright, as ISO 14496-12 has it: x' = -y, y' = x."""


def numbered_picture(number: int, width: int = 64, height: int = 48) -> Image:
    """Black and white columns, the bits of the number, under noise that does not compress."""
    bits = number >> np.arange(_NUM_BITS) & 1
    columns = bits[np.arange(width) * _NUM_BITS // width] * 195
    noise = np.random.default_rng(number).integers(0, 60, (height, width, 1))
    return np.broadcast_to(columns[:, None] + noise, (height, width, 3)).astype(np.uint8)


def read_number(image: Image) -> int:
    """Return the number of a picture, which may have been compressed."""
    width = image.shape[1]
    middles = (2 * np.arange(_NUM_BITS) + 1) * width // (2 * _NUM_BITS)
    return int(((image[:, middles].mean(axis=(0, 2)) > 127) << np.arange(_NUM_BITS)).sum())


def write_video(
    path: Path,
    times_s: Sequence[float],
    *,
    first_number: int = 0,
    size: tuple[int, int] = (64, 48),
    pixel_format: str = "yuv420p",
    key_every: int = 10,
) -> Path:
    """Encode numbered pictures as H.264, one for each time; the suffix says the container."""
    is_fast = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=is_fast) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = key_every
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_S)
        for number, time_s in enumerate(times_s, first_number):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, *size), format="rgb24")
            frame.pts = round(time_s * _TICKS_PER_S)
            frame.time_base = Fraction(1, _TICKS_PER_S)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def every(period_s: float, count: int) -> list[float]:
    """Return the times of frames at a constant rate."""
    return [k * period_s for k in range(count)]


def turn_clockwise(path: Path) -> Path:
    """Write into the track header of an MP4 file that it is to be shown turned by 90 degrees."""
    content = bytearray(path.read_bytes())
    # Version and flags, two times, track, reserved, duration, reserved, four numbers of 16 bits.
    matrix = content.index(b"tkhd") + 4 + 4 + 8 + 4 + 4 + 4 + 8 + 8
    struct.pack_into(">9i", content, matrix, *_QUARTER_TURN_CLOCKWISE)
    path.write_bytes(content)
    return path


def flip_bytes(path: Path, start: float, end: float, count: int, seed: int = 0) -> Path:
    """Change ``count`` bytes between two shares of the length of a file."""
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    places = generator.integers(int(start * len(content)), int(end * len(content)), count)
    for place in places:
        content[place] ^= int(generator.integers(1, 256))
    path.write_bytes(content)
    return path


def truncate(path: Path, share: float) -> Path:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path
