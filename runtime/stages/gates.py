"""Gates: thresholds that the evaluated model must reach, else nothing that depends on it is run."""

import difflib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.intervals import Figure


@dataclass(frozen=True)
class Gate:
    """The evaluated model's `metric` must be at least `threshold`; at most, where lower is better."""

    metric: str
    threshold: float


@dataclass(frozen=True)
class Verdict:
    """A gate, and the figure that it was held against."""

    metric: str
    threshold: float
    value: float
    low: float
    high: float
    margin: float  # how far the value is on the right side of the threshold; negative: on the wrong one
    passed: bool
    clear: bool  # the 95 % interval excludes the threshold

    def __str__(self) -> str:
        where = "below" if self.value < self.threshold else "above" if self.value > self.threshold else "at"
        by = f" by {number(abs(self.margin))}" if self.margin else ""
        interval = "excludes" if self.clear else "includes"
        return (
            f"{self.metric}: {number(self.value)} [{number(self.low)}, {number(self.high)}] is {where} "
            f"{self.threshold:g}{by} (95 % interval {interval} the threshold)"
        )


def check_gates(gates: Sequence[Gate], metrics: Collection[str]) -> None:
    """Raise DataError where a gate names a metric that this evaluation does not measure, or its threshold is no number."""
    for gate in gates:
        if gate.metric not in metrics:
            near = difflib.get_close_matches(gate.metric, metrics, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            known = ", ".join(sorted(metrics)) or "nothing"
            raise DataError(f"gate {gate.metric}: this evaluation has no such metric{meant}; it measures {known}")
        if not math.isfinite(gate.threshold):
            raise DataError(f"gate {gate.metric}: the threshold {gate.threshold} is no number to compare with")


def judge(gate: Gate, figure: Figure, *, higher_is_better: bool) -> Verdict:
    """Hold a figure against its gate. A value at the threshold passes."""
    margin = (figure.value - gate.threshold) * (1 if higher_is_better else -1)
    return Verdict(
        metric=gate.metric,
        threshold=gate.threshold,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        margin=margin,
        passed=margin >= 0,
        clear=not figure.low <= gate.threshold <= figure.high,
    )


def number(value: float) -> str:
    """A figure as tables and messages show it: three decimals where it is small."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
