"""Charts of a training stage, as HTML fragments that need plotly.js on the page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.runtime.errors import MissingExtra
from trainwright.runtime.report.curves import Curve, curve, perplexity_nats, validation_curves

# Okabe and Ito's colours (jfly.uni-koeln.de/color) without black and yellow: told apart with colour blindness, on any ground.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK = "#808080"  # text and axes: read on a light and on a dark page
GRID = "rgba(128, 128, 128, 0.25)"


@dataclass(frozen=True)
class Chart:
    """`html`: a `div` and its script."""

    title: str
    html: str


def plotly_script() -> str:
    """The text of plotly.js. Raises MissingExtra where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("the report needs plotly; install it with pip install 'trainwright[plot]'") from None
    text: str = get_plotlyjs()
    return text


def training_charts(stage: str, rows: Sequence[dict[str, Any]], expected_tokens_per_s: float) -> list[Chart]:
    """Loss, learning rate, gradient norm and throughput, each where the rows have it. `expected_tokens_per_s` 0: not known."""
    levels = []
    for who, name in (("test", "test, after training"), ("bigram", "bigram model, test")):
        nats = perplexity_nats(rows, who)
        if nats is not None:
            levels.append((name, nats))
    loss = [curve(rows, "loss", "training")]
    drawn = [("Loss", "nats a token", [*loss, *validation_curves(rows)], levels)]
    expected = [("expected by the plan", expected_tokens_per_s)] if expected_tokens_per_s > 0 else []
    drawn += [
        ("Learning rate", "", [curve(rows, "learning_rate", "learning rate")], []),
        ("Gradient norm", "before clipping", [curve(rows, "grad_norm", "gradient norm")], []),
        ("Throughput", "tokens/s, all devices", [curve(rows, "tokens_per_s", "measured")], expected),
    ]
    return [
        Chart(title, _draw(f"{stage}-{number}", unit, curves, levels, from_zero=title != "Loss"))
        for number, (title, unit, curves, levels) in enumerate(drawn)
        if any(one.values for one in curves)
    ]


def _draw(name: str, unit: str, curves: Sequence[Curve], levels: Sequence[tuple[str, float]], from_zero: bool) -> str:
    """One chart; `levels` are horizontal lines. x is tokens where every curve has them, else steps."""
    from plotly import graph_objects, io

    curves = [one for one in curves if one.values]
    by_tokens = all(one.tokens for one in curves)
    figure = graph_objects.Figure()
    for number, one in enumerate(curves):
        figure.add_scatter(
            x=list(one.tokens if by_tokens else one.steps),
            y=list(one.values),
            customdata=list(one.steps),
            # plotly reads a little HTML in names, and a source's name is the user's.
            name=html.escape(one.name),
            mode="lines" if len(one.values) > 60 else "lines+markers",
            line={"width": 1.5, "color": COLOURS[number % len(COLOURS)]},
            hovertemplate="step %{customdata}: %{y:.5g}<extra>%{fullData.name}</extra>",
        )
    first = min(min(one.tokens if by_tokens else one.steps) for one in curves)
    last = max(max(one.tokens if by_tokens else one.steps) for one in curves)
    for number, (level, value) in enumerate(levels):
        figure.add_scatter(
            x=[first, last],
            y=[value, value],
            name=f"{level}: {value:.4g}",
            mode="lines",
            line={"width": 1.5, "dash": "dash", "color": COLOURS[-1 - number % len(COLOURS)]},
            hovertemplate="%{y:.5g}<extra>%{fullData.name}</extra>",
        )
    axis = {"gridcolor": GRID, "linecolor": INK, "zeroline": False}
    figure.update_layout(
        template="none",
        height=360,
        margin={"l": 60, "r": 15, "t": 10, "b": 45},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": INK, "size": 12},
        xaxis={**axis, "title": {"text": "tokens" if by_tokens else "step"}, "exponentformat": "SI"},
        yaxis={**axis, "title": {"text": unit}, "rangemode": "tozero" if from_zero else "normal"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        showlegend=len(curves) + len(levels) > 1,
    )
    text: str = io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{''.join(char if char.isalnum() else '-' for char in name)}",
        config={"displayModeBar": False, "responsive": True},
    )
    return text
