"""Frames of one array in a file: a video that was decoded beforehand (as RVS comes)."""

from pathlib import Path

import numpy as np

from offload.errors import ConfigError
from offload.video.sampling import Sampler
from offload.video.source import Source
from offload.video.types import Frame


class ArrayFile(Source):
    """Frames of a ``.npy`` file, uint8 [num_frames, height, width, 3]; read one by one.

    Parameters
    ----------
    path : Path
    fps : float
        Frames per second in the file.
    sampler : Sampler

    Raises
    ------
    ConfigError
        It is no such array, or shorter than its header says.
    """

    def __init__(self, path: Path, fps: float, sampler: Sampler) -> None:
        try:
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ConfigError(f"{path} cannot be read as an array: {error}") from error
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ConfigError(
                f"{path}: needs uint8 [num_frames, height, width, 3], "
                f"found {frames.dtype} {list(frames.shape)}"
            )
        super().__init__(str(path), len(frames) / fps)
        self._frames = frames
        self._fps = fps
        self._sampler = sampler

    def read_frame(self) -> Frame:  # noqa: D102 - docstring inherited
        while self.stats.decoded < len(self._frames):
            index = self.stats.decoded
            self.stats.decoded += 1
            time_s = index / self._fps
            if self._sampler.takes(time_s):
                # A copy: the mapped file must not outlive the source.
                return Frame(time_s, np.array(self._frames[index]))
            self.stats.skipped += 1
        raise StopIteration

    def _release(self) -> None:
        self._frames = np.empty((0, 0, 0, 3), np.uint8)
