"""The pipeline's control of an engine, with what it believes before anything was measured."""

from pathlib import Path

from offload.bandwidth import PIECE_BYTES, measure_disk
from offload.codec_calibration import calibrate
from offload.pipeline_control import PipelineControl
from offload.prefetch.pipeline import CodecCost, LayerWork, Links
from offload.prefetch.stage_clock import StageClock
from offload.presets import Preset
from offload.stats import Counters
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codecs import Unit
from offload.tiers.disk import DiskTier
from offload.types import ChunkLayout

_PROBE_BYTES = 16 << 20
_DISK_BYTES_PER_S = 1e9
_READ_S = 30e-6
_CANDIDATES = ("bf16x", "int8", "kivi4")
"""What ``codec="auto"`` chooses from for a sparse policy; exact ones lose nothing."""
_CONTEXT_TOKENS = 1 << 15
_BUDGET = 0.1
_MISSES = 0.3
"""What is expected of a layer: a tenth of a context of 32K tokens, a third of it not in memory."""


def open_control(
    preset: Preset,
    layout: ChunkLayout,
    disk: DiskTier,
    counters: Counters,
    choice: CodecChoice,
    directory: Path,
    *,
    is_auto: bool,
    is_shared: bool,
) -> PipelineControl:
    """Return what watches the pipeline of an engine.

    Parameters
    ----------
    preset : Preset
    layout : ChunkLayout
    disk, counters
        What is watched.
    choice : CodecChoice
        What is told, if ``is_auto``.
    directory : Path
        Of the disk, whose speed is then measured, which writes and reads 48 MiB.
    is_auto, is_shared : bool
        See ``PipelineControl`` and ``Links``.

    Raises
    ------
    ConfigError, StorageError
        The disk cannot be measured.
    """
    links = Links(_DISK_BYTES_PER_S, _READ_S, float("inf"), is_shared)
    codecs: list[CodecCost] = []
    if is_auto:
        found = measure_disk(directory, _PROBE_BYTES)
        read_s = max(0.0, 1 / found.pieces_per_s - PIECE_BYTES / found.read_bytes_per_s)
        links = Links(found.read_bytes_per_s, read_s, float("inf"), is_shared)
        names = ("bf16x",) if preset.sparse is None else _CANDIDATES
        unit = Unit(layout.chunk_tokens, layout.key_dim, layout.value_dim, layout.dtype)
        codecs = calibrate(names, unit)
    control = PipelineControl(
        StageClock(links, codecs),
        disk,
        counters,
        choice,
        is_auto=is_auto,
        least_share=preset.rows.least_disk_share,
    )
    if is_auto:
        control.plan_for(_expected_work(preset, layout))
    return control


def _expected_work(preset: Preset, layout: ChunkLayout) -> LayerWork:
    """Return what one layer may want; nothing is known of its compute, so nothing hides."""
    token_bytes = layout.chunk_bytes / layout.chunk_tokens
    if preset.sparse is None:
        return LayerWork(_CONTEXT_TOKENS * token_bytes, 0, _CONTEXT_TOKENS / 64, 0)
    wanted = _MISSES * _BUDGET * _CONTEXT_TOKENS
    pieces = wanted * layout.num_kv_heads / (preset.rows.piece_tokens or layout.chunk_tokens)
    return LayerWork(wanted * token_bytes, 0, pieces, 0)
