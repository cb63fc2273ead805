"""The figures of an evaluation: `results.json`, `items.jsonl`, the table in the log, the line in the table of stages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainwright.runtime.stages.gates import Gate, Verdict, judge, number
from trainwright.runtime.stages.intervals import Figure
from trainwright.runtime.stages.measures import Metric, Values


@dataclass(frozen=True)
class Results:
    """Every figure, by model and metric. The first model is the one that is evaluated; the others it is compared with."""

    models: Sequence[str]
    metrics: Mapping[str, Metric]
    figures: Mapping[str, Mapping[str, Figure]]  # by model
    differences: Mapping[str, Mapping[str, Figure]]  # by compared model: the evaluated one less that
    baselines: Mapping[str, Mapping[str, float]]
    verdicts: Sequence[Verdict]

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.passed]

    def document(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What `results.json` holds; docs/reference/files.md describes it. `about` is added to it."""
        return {
            **about,
            "model": self.models[0],
            "about": {
                name: {"items": metric.unit, "interval": metric.method, "chance": metric.chance}
                for name, metric in self.metrics.items()
            },
            "metrics": {
                model: {
                    name: {**asdict(figure), "higher_is_better": self.metrics[name].higher_is_better}
                    for name, figure in figures.items()
                }
                for model, figures in self.figures.items()
            },
            "differences": {
                model: {name: asdict(figure) for name, figure in figures.items()}
                for model, figures in self.differences.items()
            },
            "baselines": self.baselines,
            "gates": [asdict(verdict) for verdict in self.verdicts],
        }

    def table(self) -> str:
        """For people: a line a metric."""
        main, *others = self.models
        head = ["metric", "n", f"{main} [95 %]"]
        for model in others:
            head += [model, f"{main} - {model} [95 %]"]
        rows = [head]
        for name, figure in self.figures[main].items():
            row = [name, f"{figure.n:,}", _interval(figure)]
            for model in others:
                row += [number(self.figures[model][name].value), _interval(self.differences[model][name], sign="+")]
            rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        for baseline, figures in self.baselines.items():
            listed = ", ".join(f"{name} {number(value)}" for name, value in figures.items())
            lines.append(f"{baseline}, on the same tokens: {listed}")
        lines += [f"gate {'passed' if verdict.passed else 'FAILED'}: {verdict}" for verdict in self.verdicts]
        return "\n".join(lines)

    def key_figure(self) -> str:
        """The most telling figures, in one line."""
        main, figures = self.models[0], self.figures[self.models[0]]
        parts = []
        accuracy = next((name for name in figures if name.startswith("accuracy/")), None)
        if accuracy:
            figure = figures[accuracy]
            parts.append(f"{accuracy} {figure.value:.2f} [{figure.low:.2f}, {figure.high:.2f}]")
        preference = next((name for name in figures if name.startswith("preference_accuracy/")), None)
        if preference:
            parts.append(f"preference {figures[preference].value:.2f}{self._over(preference)}")
        if "perplexity" in figures and len(parts) < 2:
            bigram = self.baselines.get("bigram", {}).get("perplexity")
            beside = f" (bigram {bigram:.1f})" if bigram else ""
            parts.append(f"perplexity {figures['perplexity'].value:.1f}{beside}")
        if not parts:
            name = next(iter(figures))
            parts.append(f"{name} {number(self.figures[main][name].value)}")
        return ", ".join(parts)

    def _over(self, metric: str) -> str:
        """The difference from the model that was compared last (mostly the one that this was made from)."""
        if not self.differences:
            return ""
        model = list(self.differences)[-1]
        return f" ({self.differences[model][metric].value:+.2f} over {model})"


def conclude(
    metrics: Mapping[str, Metric],
    values: Mapping[str, Values],
    baselines: Mapping[str, Mapping[str, float]],
    gates: Sequence[Gate],
    seed: int,
) -> Results:
    """The figures of all models from their values; the first in `values` is the one that is evaluated."""
    main, *others = values
    figures = {
        model: {name: metric.figure(values[model][name], seed) for name, metric in metrics.items()} for model in values
    }
    differences = {
        model: {
            name: metric.difference(values[main][name], values[model][name], seed) for name, metric in metrics.items()
        }
        for model in others
    }
    verdicts = [
        judge(gate, figures[main][gate.metric], higher_is_better=metrics[gate.metric].higher_is_better)
        for gate in gates
    ]
    return Results(list(values), metrics, figures, differences, baselines, verdicts)


def item_lines(metrics: Mapping[str, Metric], values: Mapping[str, Values]) -> str:
    """`items.jsonl`: of each item and metric, every model's score of that item alone."""
    lines = []
    for name, metric in metrics.items():
        if not metric.listed:
            continue
        scores = {model: those[name] / metric.items.weights for model, those in values.items()}
        for place, identity in enumerate(metric.ids):
            row = {model: round(float(those[place]), 6) for model, those in scores.items()}
            lines.append(json.dumps({"metric": name, "id": identity, "scores": row}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _interval(figure: Figure, sign: str = "") -> str:
    value, low, high = (
        f"{text if text.startswith('-') else sign + text}"
        for text in map(number, (figure.value, figure.low, figure.high))
    )
    return f"{value} [{low}, {high}]"
