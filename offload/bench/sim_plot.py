"""A picture of a sweep, with matplotlib, which is optional."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from offload.bench.sim_sweep import SweepRow
from offload.errors import ConfigError
from offload.evals.plots import INSTALL, can_draw

Curve = Sequence[tuple[float, float]]

_LEAST = 0.01
"""Of utilisation; what never comes so far is left out."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram: curves by their names."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]
    has_log_x: bool = False
    has_log_y: bool = False


def draw_panels(panels: Sequence[Panel], path: Path, columns: int = 2) -> None:
    """Draw diagrams side by side; the file's ending says the format.

    Raises
    ------
    ConfigError
        matplotlib is not installed, or the file cannot be written.
    """
    if not can_draw():
        raise ConfigError(f"plots need matplotlib: {INSTALL}")
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    canvas = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    grid = canvas.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, points in panel.curves.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        if panel.has_log_x:
            axes.set_xscale("log")
        if panel.has_log_y:
            axes.set_yscale("log")
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
    try:
        canvas.savefig(path, dpi=90)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the plot cannot be written: {error}") from error


def sweep_panels(title: str, rows: Sequence[SweepRow]) -> list[Panel]:
    """Return what parts are used, and how long answers take, over the load or the boxes."""
    is_by_boxes = len({row.num_boxes for row in rows}) > 1
    places = [float(row.num_boxes) if is_by_boxes else row.turns_per_s for row in rows]
    x_label = "boxes" if is_by_boxes else "requests per second and box"
    used: dict[str, list[tuple[float, float]]] = {}
    for place, row in zip(places, rows, strict=True):
        for name, share in row.result.utilisation.items():
            used.setdefault(name, []).append((place, share))
    used = {
        name: curve for name, curve in used.items() if max(share for _, share in curve) >= _LEAST
    }
    waits: dict[str, list[tuple[float, float]]] = {}
    for place, row in zip(places, rows, strict=True):
        for label, share in (("p50", 0.5), ("p99", 0.99)):
            waits.setdefault(f"first token {label}", []).append((place, row.result.ttft_s(share)))
            waits.setdefault(f"next token {label}", []).append((place, row.result.tbt_s(share)))
    return [
        Panel(f"{title}: parts", x_label, "utilisation", used, has_log_x=is_by_boxes),
        Panel(f"{title}: waits", x_label, "s", waits, has_log_x=is_by_boxes, has_log_y=True),
    ]
