"""Draw figures with matplotlib, which is optional."""

import importlib.util
from pathlib import Path

from offload.evals.sheets import Figure

INSTALL = 'pip install "kv-offload[plot]"'

SHARE_READ = "share of tokens read"

_LEAST = 1e-6
"""What is smaller, such as the error of reading everything, is drawn here on a logarithmic axis."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(figure: Figure, directory: Path, x_label: str = SHARE_READ) -> str:
    """Write a figure as SVG, over a logarithmic axis.

    Returns
    -------
    str
        The name of the file.
    """
    # Not pyplot: that keeps state, and asks which windows this machine has.
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4.5), layout="constrained")
    axes = canvas.subplots()
    for name, points in figure.curves.items():
        places, results = zip(*sorted(points), strict=True)
        if figure.has_log_y:
            results = tuple(max(result, _LEAST) for result in results)
        axes.plot(places, results, marker="o", markersize=4, linewidth=1.2, label=name)
    axes.set_xscale("log")
    if figure.has_log_y:
        axes.set_yscale("log")
    axes.set(title=figure.title, xlabel=x_label, ylabel=figure.y_label)
    axes.grid(visible=True, alpha=0.3)
    canvas.legend(loc="outside right upper", fontsize="small")
    file = f"{figure.name}.svg"
    # Without a date the same numbers make the same file.
    canvas.savefig(directory / file, metadata={"Date": None})
    return file
