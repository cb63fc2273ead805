"""The fit as a picture, PNG or SVG: residuals over FLOPs, and isoloss contours with the runs and the efficient frontier."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainwright.compiler.errors import MissingExtra, UsageError
from trainwright.compiler.fit.law_file import write_whole
from trainwright.compiler.fit.optimum import law_at
from trainwright.compiler.fit.result import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
POINTS = 120  # of an axis
CONTOURS = 14
MARGIN = 2.0  # times beyond the runs
PALE = 0.25  # of the losses' range
LEAST_SPREAD = 1.001  # of the losses: else there is nothing to draw contours of


def require_plot(path: Path) -> None:
    """Raises UsageError for another kind of picture, MissingExtra without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: a picture is {' or '.join(SUFFIXES)}, by the end of its name")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("--plot needs matplotlib; install it with pip install 'trainwright[plot]'") from None


def write_plot(fit: Fit, path: Path) -> None:
    """Raises FileError."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same fit gives the same bytes, and letters stay letters.
    with matplotlib.rc_context({"svg.hashsalt": "trainwright", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _draw_residuals(fit, figure, left)
        _draw_contours(fit, figure, right)
        content = io.BytesIO()
        kind = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    write_whole(path, content.getvalue())


def _draw_residuals(fit: Fit, figure: "Figure", axes: Any) -> None:
    from matplotlib.colors import LogNorm

    points = axes.scatter(
        fit.runs.model_flops, 100 * fit.residuals(), c=fit.runs.params, norm=LogNorm(), s=14, cmap="viridis"
    )
    figure.colorbar(points, ax=axes, label="parameters")
    axes.axhline(0.0, color="0.4", linewidth=0.8)
    axes.set(xscale="log", xlabel="FLOPs (6 N D)", ylabel="loss over the law, less 1 (%)", title="Residuals")


def _draw_contours(fit: Fit, figure: "Figure", axes: Any) -> None:
    from matplotlib.colors import Normalize

    flops, params = (
        np.geomspace(values.min() / MARGIN, values.max() * MARGIN, POINTS)
        for values in (fit.runs.model_flops, fit.runs.params)
    )
    across, up = np.meshgrid(flops, params)
    loss = law_at(fit.constants).loss(up, across / (6 * up))
    # Before the contours: their labels are cut out of the lines as they are drawn.
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(flops[0], flops[-1]),
        ylim=(params[0], params[-1]),
        xlabel="FLOPs (6 N D)",
        ylabel="parameters",
        title="Loss, with the runs",
    )
    # Contours between the losses of the runs: beyond, tiny models on few tokens would take them all.
    least, most = float(fit.runs.loss.min()), float(fit.runs.loss.max())
    # The palest colours of the map are no lines on white.
    colours: dict[str, Any] = {"cmap": "magma_r", "norm": Normalize(least - PALE * (most - least), most)}
    if loss.min() < most and least < min(float(loss.max()), most / LEAST_SPREAD):
        levels = np.geomspace(least, most, CONTOURS)
        lines = axes.contour(across, up, loss, levels=levels, linewidths=0.8, **colours)
        axes.clabel(lines, fmt="%.2f", fontsize=7)
    points = axes.scatter(fit.runs.model_flops, fit.runs.params, c=fit.runs.loss, s=14, zorder=3, **colours)
    figure.colorbar(points, ax=axes, label="loss")
    best = [fit.at(budget)["params"] for budget in flops]
    axes.plot(flops, [one.value for one in best], color="C0", label="efficient frontier")
    axes.fill_between(
        flops,
        *np.transpose([one.interval_80 for one in best]),
        color="C0",
        alpha=0.25,
        linewidth=0,
        label="80 % interval",
    )
    axes.legend(loc="upper left", fontsize=8)
