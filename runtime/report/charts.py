"""Charts of a stage, as HTML fragments that need plotly.js on the page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.runtime.errors import MissingExtra
from trainwright.runtime.report.curves import Curve, curve, perplexity_nats, validation_curves
from trainwright.runtime.report.evaluation import Evaluation

# Okabe and Ito's colours (jfly.uni-koeln.de/color) without black and yellow: told apart with colour blindness, on any ground.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK = "#808080"  # text and axes: read on a light and on a dark page
GRID = "rgba(128, 128, 128, 0.25)"
# What a training stage measures beside its loss: title, unit, and the keys of the curves with their names.
FIGURES = (
    (
        "Preference",
        "share of pairs",
        (
            ("accuracy", "training: margin over the reference above 0"),
            ("validation/preference_accuracy", "validation: chosen answer likelier"),
        ),
    ),
    ("Margin", "nats over the reference", (("margin", "training"),)),
    (
        "Chosen answers",
        "log-probability, nats",
        (("chosen_log_probability", "training"), ("validation/chosen_log_probability", "validation")),
    ),
)


@dataclass(frozen=True)
class Chart:
    """`html`: a `div` and its script."""

    title: str
    html: str


_Drawn = tuple[str, str, list[Curve], list[tuple[str, float]]]  # title, unit, curves, levels


def plotly_script() -> str:
    """The text of plotly.js. Raises MissingExtra where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("the report needs plotly; install it with pip install 'trainwright[plot]'") from None
    text: str = get_plotlyjs()
    return text


def training_charts(stage: str, rows: Sequence[dict[str, Any]], expected_tokens_per_s: float) -> list[Chart]:
    """Loss, learning rate, gradient norm, throughput and the stage's own figures, each where the rows have it.
    `expected_tokens_per_s` 0: not known."""
    levels = []
    for who, name in (("test", "test, after training"), ("bigram", "bigram model, test")):
        nats = perplexity_nats(rows, who)
        if nats is not None:
            levels.append((name, nats))
    own: list[_Drawn] = [
        (title, unit, [curve(rows, key, name) for key, name in keys], []) for title, unit, keys in FIGURES
    ]
    shown = {key for _, _, keys in FIGURES for key, _ in keys}
    losses = [one for one in validation_curves(rows) if one.name not in shown]
    of_pairs = any(one.values for _, _, curves, _ in own for one in curves)
    expected = [("expected by the plan", expected_tokens_per_s)] if expected_tokens_per_s > 0 else []
    drawn = [
        ("Loss", "a pair" if of_pairs else "nats a token", [curve(rows, "loss", "training"), *losses], levels),
        *own,
        ("Learning rate", "", [curve(rows, "learning_rate", "learning rate")], []),
        ("Gradient norm", "before clipping", [curve(rows, "grad_norm", "gradient norm")], []),
        ("Throughput", "tokens/s, all devices", [curve(rows, "tokens_per_s", "measured")], expected),
    ]
    from_data = {"Loss", *(title for title, _, _ in FIGURES)}  # an axis from 0 would hide how they change
    return [
        Chart(title, _draw(f"{stage}-{number}", unit, curves, levels, from_zero=title not in from_data))
        for number, (title, unit, curves, levels) in enumerate(drawn)
        if any(one.values for one in curves)
    ]


def share_chart(stage: str, evaluation: Evaluation) -> list[Chart]:
    """Bars of every share, a colour a model, with intervals and what guessing gives; nothing where there is no share."""
    from plotly import graph_objects

    if not evaluation.shares:
        return []
    figure = graph_objects.Figure()
    places = list(range(len(evaluation.shares)))
    for number, model in enumerate(next(iter(evaluation.shares.values()))):
        bars = [by_model[model] for by_model in evaluation.shares.values()]
        figure.add_bar(
            x=places,
            y=[bar.value for bar in bars],
            error_y={
                "type": "data",
                "array": [bar.high - bar.value for bar in bars],
                "arrayminus": [bar.value - bar.low for bar in bars],
                "color": INK,
                "thickness": 1.2,
            },
            name=html.escape(model),
            marker={"color": COLOURS[number % len(COLOURS)]},
            hovertemplate="%{y:.3f}<extra>%{fullData.name}</extra>",
        )
    chances = [(place, evaluation.chances.get(name)) for place, name in enumerate(evaluation.shares)]
    if any(chance is not None for _, chance in chances):
        figure.add_scatter(
            x=[x for place, chance in chances if chance is not None for x in (place - 0.48, place + 0.48, None)],
            y=[y for _, chance in chances if chance is not None for y in (chance, chance, None)],
            name="chance",
            mode="lines",
            line={"width": 1.5, "dash": "dash", "color": COLOURS[-1]},
            hovertemplate="%{y:.3f}<extra>chance</extra>",
        )
    names = [html.escape(name.replace("_", " ")).replace("/", "<br>", 1) for name in evaluation.shares]
    _lay_out(
        figure,
        x={"tickvals": places, "ticktext": names, "showgrid": False, "automargin": True},
        y={"range": [0, 1]},
        legend=True,
    )
    return [Chart("Shares, with 95 % intervals", _fragment(figure, f"{stage}-shares"))]


def _draw(name: str, unit: str, curves: Sequence[Curve], levels: Sequence[tuple[str, float]], from_zero: bool) -> str:
    """One chart; `levels` are horizontal lines. x is tokens where every curve has them, else steps."""
    from plotly import graph_objects

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
    _lay_out(
        figure,
        x={"title": {"text": "tokens" if by_tokens else "step"}, "exponentformat": "SI"},
        y={"title": {"text": unit}, "rangemode": "tozero" if from_zero else "normal"},
        legend=len(curves) + len(levels) > 1,
    )
    return _fragment(figure, name)


def _lay_out(figure: Any, *, x: dict[str, Any], y: dict[str, Any], legend: bool) -> None:
    axis = {"gridcolor": GRID, "linecolor": INK, "zeroline": False}
    figure.update_layout(
        template="none",
        height=360,
        margin={"l": 60, "r": 15, "t": 10, "b": 45},
        paper_bgcolor="rgba(0, 0, 0, 0)",
        plot_bgcolor="rgba(0, 0, 0, 0)",
        font={"color": INK, "size": 12},
        xaxis={**axis, **x},
        yaxis={**axis, **y},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        showlegend=legend,
    )


def _fragment(figure: Any, name: str) -> str:
    from plotly import io

    text: str = io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{''.join(char if char.isalnum() else '-' for char in name)}",
        config={"displayModeBar": False, "responsive": True},
    )
    return text
