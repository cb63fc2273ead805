"""A stage's `metrics.jsonl` as curves that a page can hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.runtime.reading import is_number, read_rows

MAX_POINTS = 2000  # a curve; more would not be seen on a screen and would make the page heavy


@dataclass(frozen=True)
class Curve:
    """One figure over the steps that have it. The three tuples are of one length."""

    name: str
    steps: tuple[int, ...]
    tokens: tuple[float, ...]  # seen by the end of the step; empty where the rows do not say
    values: tuple[float, ...]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One row a step, in order. A step that was done again after a resume counts as it was the last time."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        if is_number(row.get("step")):
            rows.setdefault(int(row["step"]), {}).update(row)
    return [rows[step] for step in sorted(rows)]


def curve(rows: Sequence[dict[str, Any]], key: str, name: str = "") -> Curve:
    """The figure `key` as a curve of at most about MAX_POINTS points; the last one is always there."""
    points = [row for row in rows if is_number(row.get(key)) and math.isfinite(row[key])]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    points = [row for index, row in enumerate(points) if index % stride == 0 or index == len(points) - 1]
    tokens = tuple(row["tokens"] for row in points if is_number(row.get("tokens")))
    return Curve(
        name=name or key,
        steps=tuple(int(row["step"]) for row in points),
        tokens=tokens if len(tokens) == len(points) else (),
        values=tuple(float(row[key]) for row in points),
    )


def validation_curves(rows: Sequence[dict[str, Any]]) -> list[Curve]:
    """One curve a source: nats a token on its held-out documents."""
    keys = sorted({key for row in rows for key in row if key.startswith("validation/")})
    return [curve(rows, key) for key in keys]


def last_value(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The last finite figure `key`; None where there is none."""
    found = [row[key] for row in rows if is_number(row.get(key)) and math.isfinite(row[key])]
    return float(found[-1]) if found else None


def perplexity_nats(rows: Sequence[dict[str, Any]], who: str) -> float | None:
    """`<who>/perplexity` as a loss: its natural logarithm, in nats a token; None where there is none."""
    perplexity = last_value(rows, f"{who}/perplexity")
    return math.log(perplexity) if perplexity is not None and perplexity > 0 else None
