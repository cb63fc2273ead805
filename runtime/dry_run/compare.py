"""The shadow's figures beside the plan's: what must agree, and by how much it does not."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainwright.runtime.dry_run.planned import PlannedRank
from trainwright.runtime.shadow.result import RankResult

STATIC_TOLERANCE = 0.005  # of bytes that last: buffers are padded, and blocks rounded up
UNBOUNDED = float("inf")  # shown, not judged


@dataclass(frozen=True)
class Comparison:
    """One figure of a rank. `module` is "" for the whole rank; `allowed` is relative to the plan's figure."""

    quantity: str
    module: str
    planned: int
    found: int
    allowed: float

    @property
    def difference(self) -> float:
        """Relative to the plan's figure; of nothing planned, infinite."""
        if self.planned == self.found:
            return 0.0
        return (self.found - self.planned) / self.planned if self.planned else UNBOUNDED

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= self.allowed

    def __str__(self) -> str:
        where = f" of {self.module}" if self.module else ""
        return f"{self.quantity}{where}: planned {self.planned:,}, in shadow {self.found:,} ({self.difference:+.3%})"


def compare(result: RankResult, planned: PlannedRank, tolerance: float = 0.0) -> tuple[Comparison, ...]:
    """Parameters and FLOPs must agree exactly, static bytes within STATIC_TOLERANCE; `tolerance`, relative, allows all of them
    more. Peak bytes are an estimate: they are never judged."""
    return tuple(_comparisons(result, planned, tolerance))


def _comparisons(result: RankResult, planned: PlannedRank, tolerance: float) -> Iterator[Comparison]:
    yield Comparison("parameters", "", planned.parameters, result.parameters, tolerance)
    yield Comparison("FLOPs", "", planned.flops, result.flops, tolerance)
    ours = {part.module: part for part in result.modules}
    theirs = {part.module: part for part in planned.modules}
    for module in dict.fromkeys([*theirs, *ours]):
        mine, other = ours.get(module), theirs.get(module)
        for quantity, field in (("parameters", "parameters"), ("FLOPs", "flops")):
            figures = (getattr(other, field, 0), getattr(mine, field, 0))
            if any(figures):
                yield Comparison(quantity, module, *figures, allowed=tolerance)
    for kind, amount in (
        ("parameters", planned.parameter_bytes),
        ("gradients", planned.gradient_bytes),
        ("optimizer", planned.optimizer_bytes),
    ):
        allowed = max(tolerance, STATIC_TOLERANCE)
        yield Comparison(f"bytes of {kind}", "", amount, result.static_bytes.get(kind, 0), allowed)
    yield Comparison("bytes at the peak", "", planned.peak_bytes, result.peak_bytes, UNBOUNDED)
