"""A dot plot as SVG text: of each law its size and tokens at some budgets. The same numbers give the same bytes anywhere."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Band = tuple[float, float]

COLOURS = ("#1f6fb4", "#d2691e")  # one a budget
LEFT, PANEL, GAP, ROW, TOP = 260, 300, 50, 20, 60  # pixels
RADIUS = 4
STYLE = (
    "text{font:12px sans-serif;fill:#222}line{stroke:#ddd}.tick{font-size:11px;fill:#666;text-anchor:middle}"
    ".row{text-anchor:end}"
)


@dataclass(frozen=True)
class Dot:
    """What a law says of a budget; `filled`: its size compares with the default's."""

    parameters: float
    tokens: float
    filled: bool


def draw(
    labels: Sequence[str], budgets: Sequence[str], dots: Sequence[Sequence[Dot]], bands: Sequence[tuple[Band, Band]]
) -> str:
    """dots[budget][row]; bands[budget] of (parameters, tokens), drawn behind all rows."""
    width, height = LEFT + 2 * PANEL + GAP + 20, TOP + ROW * len(labels) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        "<title>Size and tokens that each scaling law asks for</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, (name, colour) in enumerate(zip(budgets, COLOURS, strict=True)):
        x = LEFT + 150 * index
        lines.append(f'<circle cx="{x}" cy="16" r="{RADIUS}" fill="{colour}"/><text x="{x + 10}" y="20">{name}</text>')
    for row, label in enumerate(labels):
        lines.append(f'<text class="row" x="{LEFT - 10}" y="{_y(row) + 4}">{label}</text>')
    for panel, title in enumerate(("parameters", "tokens")):
        values = [[(dot.parameters, dot.tokens)[panel] for dot in column] for column in dots]
        limits = [band[panel] for band in bands]
        lines += _panel(LEFT + panel * (PANEL + GAP), title, values, limits, dots)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(
    left: float,
    title: str,
    values: Sequence[Sequence[float]],
    limits: Sequence[Band],
    dots: Sequence[Sequence[Dot]],
) -> list[str]:
    rows = len(values[0])
    bottom = TOP + ROW * rows
    low = math.floor(math.log10(min(map(min, values))))
    high = math.ceil(math.log10(max(map(max, values))))

    def at(value: float) -> float:
        return left + PANEL * (math.log10(value) - low) / (high - low)

    lines = [f'<text class="tick" x="{left + PANEL / 2:.0f}" y="{TOP - 12}">{title}</text>']
    for (start, end), colour in zip(limits, COLOURS, strict=True):
        lines.append(
            f'<rect x="{at(start):.1f}" y="{TOP}" width="{at(end) - at(start):.1f}" height="{ROW * rows}" fill="{colour}"'
            ' fill-opacity="0.18"/>'
        )
    for decade in range(low, high + 1):
        x = at(10.0**decade)
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        lines.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}">{_decade(decade)}</text>')
    for column, colour, told in zip(values, COLOURS, dots, strict=True):
        lines += _dots(column, told, colour, at)
    return lines


def _dots(column: Sequence[float], told: Sequence[Dot], colour: str, at: Callable[[float], float]) -> list[str]:
    return [
        f'<circle cx="{at(value):.1f}" cy="{_y(row)}" r="{RADIUS}" fill="{colour if dot.filled else "#fff"}" stroke="{colour}"/>'
        for row, (value, dot) in enumerate(zip(column, told, strict=True))
    ]


def _y(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _decade(exponent: int) -> str:
    """100M, 1B, 10T: parameters and tokens are both in the millions to trillions."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M")):
        if exponent >= power:
            return f"{10 ** (exponent - power)}{letter}"
    return f"1e{exponent}"
