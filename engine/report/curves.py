"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..util.suggest import install


def draw_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[float]],
    lines: Mapping[str, float],
    *,
    ylabel: str,
    title: str,
    smooth: int = 5,
) -> Path:
    """Draws one curve per run over its updates, its running mean on top, and horizontal lines to
    compare with.

    Args:
        path: of the picture.
        curves: name to one value per update.
        lines: name to a constant (expert, random player, ...).
        ylabel: of the vertical axis.
        title: above the picture.
        smooth: width of the running mean.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: {install('plots')}") from error
    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for colour, (name, values) in zip(colours, curves.items(), strict=False):
        updates = np.arange(1, len(values) + 1)
        axes.plot(updates, values, color=colour, alpha=0.25, linewidth=1)
        width = min(smooth, len(values))
        mean = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(updates[width - 1 :], mean, color=colour, linewidth=2, label=name)
    for style, (name, value) in zip(("--", ":", "-.", (0, (1, 3))), lines.items(), strict=False):
        axes.axhline(value, color="0.4", linewidth=1, linestyle=style)
        axes.annotate(
            name,
            (1.01, value),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="0.3",
        )
    axes.set(xlabel="update", ylabel=ylabel, title=title)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(str(path))
    plt.close(figure)
    return Path(path)
