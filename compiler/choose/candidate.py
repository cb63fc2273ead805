"""One round of the loop between budget and layout, and whether the budget pays for it."""

import math
from dataclasses import dataclass

from trainwright.compiler.choose.layout import LayoutChoice
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.plan import Shape, Training
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_quantity


@dataclass(frozen=True)
class Candidate:
    """One round of the loop: shape, tokens, training, and the layouts that fit, best first."""

    ledger: Ledger
    shape: Shape
    tokens: int
    training: Training
    workload: Workload
    layouts: LayoutChoice
    warnings: tuple[str, ...]

    @property
    def flops_per_s(self) -> float:
        """Model FLOPs a second on all devices: what a second of the budget buys."""
        each = model_flops_per_token(self.shape, self.training.context_length)
        return each * self.training.tokens_per_step / self.layouts.step_s

    def same(self, other: "Candidate") -> bool:
        return self.shape == other.shape and self.training == other.training


def place(spec: ResolvedSpec, *paths: str) -> str:
    """The first of these spec paths that the user wrote, with its place: what stands in the way."""
    path = next((path for path in paths if path in spec.pins), paths[-1])
    return f"{spec.pins[path]}: {path}" if path in spec.pins else path


def allowed_amount(spec: ResolvedSpec) -> float:
    """The budget's amount in its own unit; infinite without one. Figures are rounded to 6 digits, so a millionth is let pass."""
    budget = spec.compute.budget
    return math.inf if budget.kind == "none" else budget.amount * (1 + 1e-6)


def needed_amount(spec: ResolvedSpec, chosen: Candidate) -> float:
    """What the run takes, in the unit of the budget."""
    compute = spec.compute
    train_s = chosen.training.steps * chosen.layouts.step_s
    match compute.budget.kind:
        case "time":
            return train_s
        case "device_hours":
            return train_s / 3600 * compute.devices
        case "money":
            return train_s / 3600 * compute.devices * compute.price_usd_per_device_hour
        case "flops":
            tokens = chosen.training.steps * chosen.training.tokens_per_step
            return model_flops_per_token(chosen.shape, chosen.training.context_length) * tokens
        case _:
            return 0.0


def require_budget(spec: ResolvedSpec, chosen: Candidate) -> None:
    """Refuse a run that the budget does not pay for: a spec that pins size and tokens can ask for one."""
    needed, compute, kind = needed_amount(spec, chosen), spec.compute, spec.compute.budget.kind
    if needed <= allowed_amount(spec):
        return
    wanted, allowed = format_quantity(kind, needed), format_quantity(kind, compute.budget.amount)
    over = format_quantity(kind, needed - compute.budget.amount)
    raise InfeasibleError(
        f"{place(spec, 'compute.budget')}: {chosen.training.steps:,} steps x {chosen.layouts.step_s:.3g} s on "
        f"{compute.devices} x {compute.device.name} need {wanted}, the budget is {allowed}: {over} too much; "
        "lower data.tokens or model.size, add devices, or raise the budget"
    )
