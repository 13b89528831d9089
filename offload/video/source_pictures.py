"""Frames from a folder of pictures, or from those that a pattern names."""

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from offload.errors import ConfigError
from offload.video.sampling import Sampler
from offload.video.source import Source
from offload.video.types import Frame, Image

_LOG = logging.getLogger(__name__)

PICTURE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key by which ``frame2`` comes before ``frame10``."""
    return [
        (0, int(part), part) if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]


class Pictures(Source):
    """Pictures in natural order of their names; each is opened when it is its turn.

    Parameters
    ----------
    name : str
        The folder or pattern.
    paths : sequence of Path
        Files of other kinds among them are left out.
    fps : float or None
        Pictures per second. None: each is shown when its file was last modified.
    sampler : Sampler

    Raises
    ------
    ConfigError
        Pillow is not installed, there is no picture, or times of modification do not increase.
    """

    def __init__(
        self, name: str, paths: Sequence[Path], fps: float | None, sampler: Sampler
    ) -> None:
        _require_pillow()
        pictures = sorted(
            (path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES),
            key=lambda path: natural_key(str(path)),
        )
        if not pictures:
            kinds = ", ".join(sorted(PICTURE_SUFFIXES))
            raise ConfigError(f"{name}: {len(paths)} files, none of them a picture ({kinds})")
        times_s = _modified_s(pictures) if fps is None else [k / fps for k in range(len(pictures))]
        super().__init__(name, times_s[-1] if fps is None else len(pictures) / fps)
        self._sampler = sampler
        self._shots: Iterator[tuple[float, Path]] = iter(zip(times_s, pictures, strict=True))

    def read_frame(self) -> Frame:  # noqa: D102 - docstring inherited
        for time_s, path in self._shots:
            if not self._sampler.takes(time_s):
                self.stats.decoded += 1
                self.stats.skipped += 1
                continue
            image = self._read(path)
            if image is not None:
                self.stats.decoded += 1
                return Frame(time_s, image)
        raise StopIteration

    def _release(self) -> None:
        self._shots = iter(())

    def _read(self, path: Path) -> Image | None:
        from PIL import Image as Pillow
        from PIL import ImageOps

        try:
            with Pillow.open(path) as picture:
                return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
            self.stats.corrupt += 1
            _LOG.warning("%s left out: %s", path, error)
            return None


def _modified_s(pictures: Sequence[Path]) -> list[float]:
    times_ns = [path.stat().st_mtime_ns for path in pictures]
    for (path, time_ns), (later, later_ns) in pairwise(zip(pictures, times_ns, strict=True)):
        if later_ns <= time_ns:
            raise ConfigError(
                f"{later} was not modified after {path}, so when they are shown is unknown; "
                "say how many there are per second (fps or picture_fps)"
            )
    return [(time_ns - times_ns[0]) / 1e9 for time_ns in times_ns]


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401 - only asked whether it is there
    except ImportError as error:
        raise ConfigError(
            "pictures need Pillow, which is not installed: pip install 'kv-offload[video]'"
        ) from error
