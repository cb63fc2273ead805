"""How large a model, on how many tokens: what the spec pins, a loss law answers the rest.

| pinned | parameters | tokens |
|---|---|---|
| size and tokens | pinned | pinned |
| size, budget | pinned | what the budget buys |
| size | pinned | the law's best for the size |
| tokens, budget | what the budget buys | pinned |
| tokens | the law's best for the tokens | pinned |
| budget | the law's best for the FLOPs | what the shape's exact FLOPs leave |
"""

from dataclasses import dataclass

from trainwright.compiler.choose.budget import choose_parameters, choose_parameters_and_tokens, choose_tokens
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.facts import LossLaw
from trainwright.compiler.plan import Shape
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_quantity


@dataclass(frozen=True)
class Answer:
    """A count and why it is what it is: `kind` and `text` of a plan.Reason."""

    value: float
    kind: str
    text: str


def budget_s(spec: ResolvedSpec) -> float:
    """Seconds on all devices that the budget allows; 0.0 where it is stated in FLOPs, or not at all."""
    compute = spec.compute
    budget = compute.budget
    match budget.kind:
        case "time":
            return budget.amount
        case "money":
            return budget.amount / compute.price_usd_per_device_hour / compute.devices * 3600
        case "device_hours":
            return budget.amount / compute.devices * 3600
        case _:
            return 0.0


def budget_flops(spec: ResolvedSpec, flops_per_s: float) -> float:
    """Training FLOPs that the budget buys at `flops_per_s` of model FLOPs on all devices; 0.0 without a budget."""
    return spec.compute.budget.amount if spec.compute.budget.kind == "flops" else budget_s(spec) * flops_per_s


def describe_budget(spec: ResolvedSpec, flops_per_s: float) -> str:
    """The arithmetic from the budget to FLOPs."""
    compute, flops = spec.compute, budget_flops(spec, flops_per_s)
    if compute.budget.kind == "flops":
        return f"{flops:.3g} FLOPs"
    written = format_quantity(compute.budget.kind, compute.budget.amount)
    return (
        f"{written} on {compute.devices} x {compute.device.name} at {flops_per_s / compute.devices:.3g} model FLOP/s each "
        f"(the chosen layout) = {flops:.3g} FLOPs"
    )


def choose_size(spec: ResolvedSpec, law: LossLaw, flops_per_s: float) -> Answer:
    """Parameters to aim the shape at."""
    size, tokens = spec.model.size, spec.data.tokens
    flops = budget_flops(spec, flops_per_s)
    if size.pinned:
        return Answer(size.low, "pinned", "model.size")
    if tokens.pinned and flops:
        text = f"{describe_budget(spec, flops_per_s)} / (6 x {tokens.low:.4g} tokens)"
        return Answer(flops / 6 / tokens.low, "derived", text)
    if tokens.pinned:
        return Answer(choose_parameters(law, tokens.low), "law", f"{law.name}: best size for {tokens.low:.4g} tokens")
    return Answer(
        choose_parameters_and_tokens(law, flops)[0],
        "law",
        f"{law.name}: best size for {describe_budget(spec, flops_per_s)}",
    )


def choose_token_budget(
    spec: ResolvedSpec, law: LossLaw, shape: Shape, parameters: int, context: int, flops_per_s: float
) -> Answer:
    """Tokens to train the shape on, by its exact FLOPs."""
    tokens, flops = spec.data.tokens, budget_flops(spec, flops_per_s)
    if tokens.pinned:
        return Answer(tokens.low, "pinned", "data.tokens")
    if flops:
        each = model_flops_per_token(shape, context)
        text = f"{describe_budget(spec, flops_per_s)} / {each:.4g} FLOPs a token of this shape"
        return Answer(flops / each, "derived", text)
    return Answer(
        choose_tokens(law, parameters), "law", f"{law.name}: best number of tokens for {parameters:,} parameters"
    )
