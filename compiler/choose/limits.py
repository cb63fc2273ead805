"""What a run may take: the budget and the deadline, as FLOPs at the utilisation of a layout.

A budget pays for training and, where inference tokens are stated, for them too; a deadline is for training alone.
"""

import math
from dataclasses import dataclass

from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.resolve import ResolvedCompute, ResolvedSpec
from trainwright.compiler.units import format_quantity

# Figures of a plan are rounded to 6 digits, so a millionth is let pass.
SLACK = 1e-6


@dataclass(frozen=True)
class Limit:
    """`path`: where the spec says it. `kind` and `amount` as a Quantity."""

    path: str
    kind: str  # "time" (s) | "money" (USD) | "flops" | "device_hours"
    amount: float

    @property
    def counts_inference(self) -> bool:
        return self.path == "compute.budget"

    def seconds(self, compute: ResolvedCompute) -> float:
        """On all devices; nan of a limit in FLOPs."""
        match self.kind:
            case "time":
                return self.amount
            case "money":
                return self.amount / compute.price_usd_per_device_hour / compute.devices * 3600
            case "device_hours":
                return self.amount / compute.devices * 3600
            case _:
                return math.nan

    def flops(self, compute: ResolvedCompute, flops_per_s: float) -> float:
        """What it buys at `flops_per_s` of model FLOPs on all devices."""
        return self.amount if self.kind == "flops" else self.seconds(compute) * flops_per_s

    def taken(self, compute: ResolvedCompute, seconds: float, flops: float) -> float:
        """What a run of so many seconds on all devices and so many FLOPs takes, in the limit's unit."""
        return flops if self.kind == "flops" else self.amount * seconds / self.seconds(compute)

    def describe(self, compute: ResolvedCompute, flops_per_s: float) -> str:
        """The arithmetic from the limit to FLOPs."""
        flops = self.flops(compute, flops_per_s)
        written = format_quantity(self.kind, self.amount)
        if self.kind == "flops":
            return f"{flops:.4g} FLOPs"
        return (
            f"{written} on {compute.devices:,} x {compute.device.name} at {flops_per_s / compute.devices:.3g} model"
            f" FLOP/s each (the chosen layout) = {flops:.4g} FLOPs"
        )


def limits_of(spec: ResolvedSpec) -> tuple[Limit, ...]:
    """The budget and the deadline, as far as they are stated."""
    budget, deadline = spec.compute.budget, spec.objective.deadline_s
    limits = []
    if budget.kind != "none":
        limits.append(Limit("compute.budget", budget.kind, budget.amount))
    if math.isfinite(deadline):
        limits.append(Limit("objective.deadline", "time", deadline))
    return tuple(limits)


def depends_on_layout(spec: ResolvedSpec) -> bool:
    """Whether a limit buys FLOPs by the utilisation of the layout: it is not stated in FLOPs."""
    return any(limit.kind != "flops" for limit in limits_of(spec))


@dataclass(frozen=True)
class Need:
    """What a run takes: training, and inference at the same utilisation."""

    steps: float  # of the whole batch
    step_s: float  # nan: not known yet
    training_flops: float
    inference_flops: float

    @property
    def training_s(self) -> float:
        return self.steps * self.step_s

    def taken(self, spec: ResolvedSpec, limit: Limit) -> float:
        """In the limit's unit."""
        extra = 1 + self.inference_flops / self.training_flops if limit.counts_inference else 1.0
        return limit.taken(spec.compute, self.training_s * extra, self.training_flops * extra)


def exceeded(spec: ResolvedSpec, need: Need) -> list[Limit]:
    """The limits that a run does not keep; while the time of a step is not known, those in FLOPs."""
    return [limit for limit in limits_of(spec) if need.taken(spec, limit) > limit.amount * (1 + SLACK)]


def require_limits(spec: ResolvedSpec, need: Need) -> None:
    """Refuse a run that budget or deadline do not allow: a spec that pins size and tokens, or a loss, can ask for one."""
    problems = [_explain(spec, limit, need) for limit in exceeded(spec, need)]
    if problems:
        raise InfeasibleError("\n".join(problems))


def _explain(spec: ResolvedSpec, limit: Limit, need: Need) -> str:
    taken, compute, kind = need.taken(spec, limit), spec.compute, limit.kind
    wanted, allowed = format_quantity(kind, taken), format_quantity(kind, limit.amount)
    over, times = format_quantity(kind, taken - limit.amount), taken / limit.amount
    inference = (
        f" and {need.inference_flops:.3g} FLOPs of inference" if need.inference_flops and limit.counts_inference else ""
    )
    devices = math.ceil(compute.devices * times)
    fix = (
        f"add devices ({times:.2f} times as many, {devices:,}, at the same utilisation)"
        if kind == "time"
        else "raise the budget"
    )
    what = "budget" if limit.path == "compute.budget" else "deadline"
    steps = (
        f"{need.steps:,} steps x {need.training_flops / need.steps:.4g} FLOPs"
        if kind == "flops"
        else f"{need.steps:,} steps x {need.step_s:.3g} s on {compute.devices:,} x {compute.device.name}"
    )
    demand = "raise objective.target_loss" if spec.objective.target_loss else "lower data.tokens or model.size"
    return (
        f"{place(spec, limit.path)}: {steps}{inference} need {wanted}, the {what} is {allowed}: {over} too much;"
        f" {demand}, or {fix}"
    )


def place(spec: ResolvedSpec, *paths: str) -> str:
    """The first of these spec paths that the user wrote, with its place: what stands in the way."""
    path = next((path for path in paths if path in spec.pins), paths[-1])
    return f"{spec.pins[path]}: {path}" if path in spec.pins else path
