from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, ConfigError
from offload.video.sources import open_source

pytestmark = pytest.mark.leaks


def _write(path: Path, num_frames: int = 6) -> Path:
    frames = np.arange(num_frames, dtype=np.uint8)[:, None, None, None]
    np.save(path, np.broadcast_to(frames, (num_frames, 4, 5, 3)))
    return path


@pytest.mark.parametrize(
    ("settings", "times_s", "numbers"),
    [
        ({}, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ({"fps": 0.5}, [0, 2, 4], [0, 2, 4]),
        ({"fps": 9.0, "picture_fps": 2.0}, [0, 0.5, 1, 1.5, 2, 2.5], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_array_of_frames_has_one_per_second_unless_told_otherwise(
    tmp_path: Path, settings: dict[str, float], times_s: list[float], numbers: list[int]
) -> None:
    path = _write(tmp_path / "video.npy")

    with open_source(path, **settings) as source:  # type: ignore[arg-type]
        frames = list(source)

    assert [frame.time_s for frame in frames] == times_s
    assert [frame.image[0, 0, 0] for frame in frames] == numbers
    assert source.duration_s == 6 / settings.get("picture_fps", 1.0)
    assert source.stats.decoded == source.stats.skipped + source.stats.yielded == 6


def test_frame_of_an_array_outlives_its_source(tmp_path: Path) -> None:
    with open_source(_write(tmp_path / "video.npy")) as source:
        frame = [next(source), next(source)][1]

    assert (frame.image == 1).all()
    with pytest.raises(ClosedError, match=r"video\.npy"):
        next(source)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), r"found uint8 \[2, 4, 4\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"found uint8 \[2, 3, 4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.float32), r"found float32"),
        (np.array([None]), "cannot be read as an array"),
    ],
)
def test_array_that_holds_no_frames_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "video.npy", array)

    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path / "video.npy")


@pytest.mark.parametrize("size", [0, 20, 200])
def test_array_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    path = _write(tmp_path / "video.npy")
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(ConfigError, match="cannot be read as an array"):
        open_source(path)
