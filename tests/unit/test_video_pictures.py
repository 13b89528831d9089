import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from offload.errors import ConfigError
from offload.video.sources import open_source
from tests.support.video_files import numbered_picture, read_number

pytestmark = pytest.mark.leaks


def _write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Pillow.fromarray(numbered_picture(number)).save(folder / name)
    return folder


def _opened(spec: str | Path, **settings: float) -> list[tuple[int, float]]:
    with open_source(spec, **settings) as source:  # type: ignore[arg-type]
        return [(read_number(frame.image), frame.time_s) for frame in source]


def test_pictures_of_a_folder_come_in_natural_order_at_the_rate_given(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", "f1.png", "f2.PNG", "f10.jpg", "g.png")
    (folder / "notes.txt").write_text("not a picture")

    assert _opened(folder, fps=2) == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]


def test_pictures_of_a_pattern_are_those_that_match(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", "f1.png", "g1.png", "f2.png")

    assert _opened(str(folder / "f*.png"), fps=1) == [(0, 0.0), (2, 1.0)]


def test_pictures_with_a_rate_of_their_own_are_sampled(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", *(f"{k}.png" for k in range(11)))

    with open_source(folder, fps=1, picture_fps=5) as source:
        frames = [(read_number(frame.image), frame.time_s) for frame in source]

    assert frames == [(0, 0.0), (5, 1.0), (10, 2.0)]
    assert source.duration_s == 2.2
    assert (source.stats.decoded, source.stats.skipped, source.stats.yielded) == (11, 8, 3)


def test_pictures_without_a_rate_are_shown_when_they_were_modified(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", "a1.png", "a2.png", "a10.png")
    for name, time_s in [("a1.png", 1000.0), ("a2.png", 1000.25), ("a10.png", 1003.5)]:
        os.utime(folder / name, (0, time_s))

    assert _opened(folder) == [(0, 0.0), (1, 0.25), (2, 3.5)]


def test_pictures_modified_at_one_time_are_refused_without_a_rate(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", "a.png", "b.png")
    for path in folder.iterdir():
        os.utime(path, (0, 1000.0))

    with pytest.raises(ConfigError, match=r"b.png was not modified after .*a.png"):
        open_source(folder)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_pictures_that_are_damaged_are_left_out_and_counted(tmp_path: Path, content: bytes) -> None:
    folder = _write(tmp_path / "frames", "1.png", "2.png", "3.png")
    (folder / "2.png").write_bytes(content)

    with open_source(folder, fps=1) as source:
        assert [frame.time_s for frame in source] == [0.0, 2.0]
    assert (source.stats.corrupt, source.stats.decoded) == (1, 2)


def test_picture_that_is_cut_off_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = _write(tmp_path / "frames", "1.png", "2.png")
    content = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(content[: len(content) // 2])

    with open_source(folder, fps=1) as source:
        assert [frame.time_s for frame in source] == [1.0]
    assert source.stats.corrupt == 1


def test_picture_that_was_taken_upright_is_turned(tmp_path: Path) -> None:
    picture = Pillow.fromarray(numbered_picture(5))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown turned clockwise
    picture.save(tmp_path / "upright.png", exif=exif)

    with open_source(tmp_path / "upright.png", fps=1) as source:
        image = next(source).image

    np.testing.assert_array_equal(image, np.rot90(numbered_picture(5), -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "I;16"])
def test_pictures_of_all_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    Pillow.new("L", (5, 4), 1).convert(mode).save(tmp_path / "picture.png")

    with open_source(tmp_path / "picture.png", fps=1) as source:
        image = next(source).image

    assert image.shape == (4, 5, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_folder_or_pattern_without_pictures_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")

    with pytest.raises(ConfigError, match="none of them a picture"):
        open_source(f"{tmp_path}/{pattern}", fps=1)


def test_pictures_without_pillow_name_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write(tmp_path / "frames", "1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)

    with pytest.raises(ConfigError, match=r"pip install 'kv-offload\[video\]'"):
        open_source(folder, fps=1)
