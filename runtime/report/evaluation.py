"""An evaluation's `results.json` as rows of a table, gates and bars that a page can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.runtime.reading import is_number


@dataclass(frozen=True)
class Cell:
    """A figure in words, and how it compares: "better" or "worse" where the interval of a difference excludes 0."""

    text: str
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """One metric over the table's columns."""

    metric: str
    count: str  # "750 questions"
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Bar:
    """A share, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What the page shows of one evaluation."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    baselines: tuple[str, ...]  # a line each
    gates: tuple[tuple[bool, str], ...]  # passed, and the sentence
    shares: Mapping[str, Mapping[str, Bar]]  # by metric and model
    chances: Mapping[str, float]  # by metric, where guessing has an expected share


def read_evaluation(results: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation in a parsed `results.json`; None where there is none."""
    main, metrics = results.get("model"), results.get("metrics", {})
    if not isinstance(main, str) or main not in metrics:
        return None
    about, others = results.get("about", {}), [model for model in metrics if model != main]
    columns = [main, *(text for model in others for text in (model, f"{main} - {model}"))]
    rows = []
    for name, figure in metrics[main].items():
        cells = [Cell(_interval(figure))]
        for model in others:
            difference = results.get("differences", {}).get(model, {}).get(name)
            cells.append(Cell(_interval(metrics[model].get(name))))
            cells.append(Cell(_interval(difference, sign="+"), _verdict(difference, figure)))
        rows.append(Row(name, f"{figure['n']:,} {about.get(name, {}).get('items', '')}".strip(), tuple(cells)))
    shares = {
        name: {model: Bar(*(those[name][key] for key in ("value", "low", "high"))) for model, those in metrics.items()}
        for name in metrics[main]
        if name.startswith(("accuracy/", "preference_accuracy/"))
    }
    return Evaluation(
        columns=tuple(columns),
        rows=tuple(rows),
        baselines=tuple(_baseline(name, figures) for name, figures in results.get("baselines", {}).items()),
        gates=tuple((bool(gate["passed"]), _gate(gate)) for gate in results.get("gates", ())),
        shares=shares,
        chances={name: one["chance"] for name, one in about.items() if name in shares and is_number(one.get("chance"))},
    )


def _interval(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    """ "0.365 [0.331, 0.400]"; nothing where there is no figure."""
    if not figure:
        return ""
    value, low, high = (f"{sign if figure[key] > 0 else ''}{_number(figure[key])}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _verdict(difference: Mapping[str, Any] | None, figure: Mapping[str, Any]) -> str:
    if not difference or difference["low"] <= 0 <= difference["high"]:
        return ""
    return "better" if (difference["value"] > 0) == figure["higher_is_better"] else "worse"


def _baseline(name: str, figures: Mapping[str, float]) -> str:
    return f"{name}, on the same tokens: " + ", ".join(
        f"{metric} {_number(value)}" for metric, value in figures.items()
    )


def _gate(gate: Mapping[str, Any]) -> str:
    side = "by" if gate["passed"] else "missed by"
    sure = "excludes" if gate["clear"] else "includes"
    return (
        f"{gate['metric']}: {_interval(gate)}, threshold {gate['threshold']:g}, {side} {_number(abs(gate['margin']))}; "
        f"the 95 % interval {sure} the threshold"
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
