"""What is believed of a disk and of codecs before anything was read: measured, where it matters."""

import math
from pathlib import Path

import pytest
import torch

from offload import pipeline_start
from offload.bandwidth import PIECE_BYTES, DiskBandwidth
from offload.codec_calibration import calibrate
from offload.errors import ConfigError
from offload.pipeline_control import PipelineControl
from offload.pipeline_start import open_control
from offload.presets import PRESETS, Preset, customised
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_ladder import find_codec
from offload.tiers.codecs import Unit
from offload.tiers.disk import DiskTier
from offload.types import ChunkLayout
from tests.support.rows import Shelf, open_shelf


def test_calibration_measures_what_each_codec_saves_and_loses() -> None:
    unit = Unit(64, 32, 32, torch.bfloat16)
    found = calibrate(("bf16x", "int8", "kivi4", "kivi2"), unit)
    ratios, errors = [cost.ratio for cost in found], [cost.error for cost in found]
    assert 1 < ratios[0] < ratios[1] < ratios[2] < ratios[3] < 16
    assert 0 == errors[0] < errors[1] < errors[2] < errors[3] < 1
    assert all(0 < cost.decode_bytes_per_s < math.inf for cost in found)
    assert calibrate(("int8",), unit)[0] is found[1]


def test_calibration_of_a_codec_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="no codec 'zip'"):
        calibrate(("zip",), Unit(64, 32, 32, torch.bfloat16))


MEASURED = DiskBandwidth(50e6, 40e6, True, 1e-4, 1500.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Disks that were measured; all of them are slow."""
    seen: list[Path] = []

    def measure(directory: Path, num_bytes: int) -> DiskBandwidth:
        seen.append(directory)
        return MEASURED

    monkeypatch.setattr(pipeline_start, "measure_disk", measure)
    return seen


def control_of(preset: Preset, shelf: Shelf, *, is_auto: bool) -> PipelineControl:
    assert isinstance(shelf.disk, DiskTier)
    return open_control(
        preset,
        ChunkLayout(2, 64, 32, 32, torch.bfloat16),
        shelf.disk,
        shelf.counters,
        CodecChoice(64, find_codec("raw")),
        Path("here"),
        is_auto=is_auto,
        is_shared=True,
    )


@pytest.mark.parametrize(
    ("policy", "candidates"), [("exact", ["bf16x"]), ("adaptive", ["bf16x", "int8", "kivi4"])]
)
def test_control_that_chooses_begins_with_a_plan_for_the_disk_that_it_measured(
    policy: str, candidates: list[str], measured: list[Path], tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        stats = control_of(PRESETS[policy], shelf, is_auto=True).stats()
    assert measured == [Path("here")]
    assert list(stats["decode_bytes_per_s"]) == candidates
    assert stats["codec"] in candidates  # which of them, the speed of this machine decides
    assert stats["encoded_share"] > 0
    assert stats["disk_bytes_per_s"] == 50e6
    piece_s = PIECE_BYTES / 50e6
    assert stats["read_s"] == pytest.approx(1 / 1500.0 - piece_s)


def test_control_that_only_watches_measures_nothing_and_leaves_the_choice(
    measured: list[Path], tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        stats = control_of(PRESETS["adaptive"], shelf, is_auto=False).stats()
    assert measured == []
    assert (stats["codec"], stats["decode_bytes_per_s"]) == ("raw", {})


def test_control_of_a_preset_that_leaves_some_on_the_disk_says_how_much(
    measured: list[Path], tmp_path: Path
) -> None:
    preset = customised("adaptive", least_disk_share=0.25)
    with open_shelf(tmp_path, 1) as shelf:
        assert control_of(preset, shelf, is_auto=True).layer_begins(10) == 3
        assert control_of(PRESETS["adaptive"], shelf, is_auto=True).layer_begins(10) is None
