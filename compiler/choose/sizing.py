"""The size to aim a shape at, and the tokens for the shape that was found: the law's answers in words, with their arithmetic."""

import math
from dataclasses import dataclass, replace

import numpy as np

from trainwright.compiler.choose.limits import Limit, limits_of, place
from trainwright.compiler.choose.question import FORWARD_SHARE, Question, answer, life_flops, needs_loss
from trainwright.compiler.choose.sizes import LARGEST, SMALLEST
from trainwright.compiler.choose.variants import SERVED_BYTES, Variant, most_parameters, sizes_of
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.laws.law import Law
from trainwright.compiler.plan import Shape
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_quantity

ENDLESS = 1e30  # tokens or parameters: their term of a loss law is gone


@dataclass(frozen=True)
class Answer:
    """A count and why it is what it is: `kind` and `text` of a plan.Reason."""

    value: float
    kind: str
    text: str


@dataclass(frozen=True)
class Sizing:
    """The variant that answers best, the parameters to aim at, and why it has the experts that it has ("": no choice)."""

    variant: Variant
    parameters: Answer
    experts: str


def ask(spec: ResolvedSpec, flops_per_s: float) -> Question:
    """What the spec pins, limits in FLOPs at `flops_per_s` of model FLOPs on all devices."""
    training = life = math.inf
    for limit in limits_of(spec):
        flops = limit.flops(spec.compute, flops_per_s)
        if limit.counts_inference:
            life = min(life, flops)
        else:
            training = min(training, flops)
    size, tokens = spec.model.size, spec.data.tokens
    return Question(
        parameters=size.low if size.pinned else 0.0,
        tokens=tokens.low if tokens.pinned else 0.0,
        target_loss=spec.objective.target_loss,
        training_flops=training,
        life_flops=life,
        inference_tokens=spec.scaling.inference_tokens,
        most_parameters=most_parameters(spec),
    )


def choose_size(spec: ResolvedSpec, variants: tuple[Variant, ...], question: Question, flops_per_s: float) -> Sizing:
    """Parameters to aim the shape at. Raises InfeasibleError for a loss that no size reaches, and for absurd budgets."""
    law = variants[0].law
    if question.parameters:
        return Sizing(variants[0], Answer(question.parameters, "pinned", "model.size"), "")
    _require_answerable(spec, law, question)
    found = [one for variant in variants if (one := _found(variant, question)) is not None]
    if not found:
        raise InfeasibleError(_explain_unreachable(spec, variants, question, flops_per_s))
    best = min(found, key=lambda one: one.merit)
    variant, total, tokens = best.variant, best.total, best.tokens
    if not SMALLEST * 1.02 < total < LARGEST / 1.02:
        raise InfeasibleError(_explain_absurd(spec, question, total, flops_per_s))
    return Sizing(
        variant,
        Answer(total, *_why_size(spec, variant.law, question, tokens, flops_per_s)),
        _why_experts(question, variant, found),
    )


def choose_token_budget(
    spec: ResolvedSpec, variant: Variant, question: Question, shape: Shape, context: int, flops_per_s: float
) -> Answer:
    """Tokens to train the shape on, by its exact FLOPs. Raises InfeasibleError for a loss that the shape does not reach."""
    law, sizes, parameters = variant.law, sizes_of(shape, context), count_parameters(shape, context)
    question = replace(question, parameters=float(parameters))
    _require_answerable(spec, law, question)
    tokens = float(answer(law, sizes, question, variant.sizes)[1][0])
    if not tokens > 0:
        raise InfeasibleError(_explain_unreachable(spec, (replace(variant, sizes=sizes),), question, flops_per_s))
    each, name = float(sizes.flops_per_token[0]), law.facts.name
    if question.tokens:
        return Answer(tokens, "pinned", "data.tokens")
    if question.target_loss:
        return Answer(
            tokens,
            "law",
            f"{name}: {parameters:,} parameters reach a loss of {question.target_loss:g} on {tokens:.4g} tokens",
        )
    if question.limited:
        bought = _describe_limits(spec, question, each, flops_per_s)
        return Answer(tokens, "derived", f"{bought} / {each:.4g} FLOPs a token of this shape")
    inference = f" that will serve {question.inference_tokens:.3g} tokens" if question.inference_tokens else ""
    return Answer(tokens, "law", f"{name}: best number of tokens for {parameters:,} parameters{inference}")


@dataclass(frozen=True)
class _Found:
    """What a variant answers, and what the best variant has least of: the loss, or the cost of a target loss."""

    variant: Variant
    total: float
    tokens: float
    merit: float


def _found(variant: Variant, question: Question) -> _Found | None:
    total, tokens = answer(variant.law, variant.sizes, question)
    if not (total[0] > 0 and tokens[0] > 0):  # nan: nothing answers
        return None
    if total[0] > question.most_parameters:  # the loss on these tokens takes more than the memory for serving holds
        return None
    if not question.target_loss and variant.law.minimises:
        counted = variant.sizes.at(variant.sizes.counted(variant.law.facts.counts), total)
        merit = variant.law.loss(counted, tokens)
    else:
        merit = life_flops(variant.sizes, question, total, tokens)
    return _Found(variant, float(total[0]), float(tokens[0]), float(merit[0]))


def _describe_limits(spec: ResolvedSpec, question: Question, each: float, flops_per_s: float) -> str:
    """The limit that binds, and what inference takes of it."""
    inference = FORWARD_SHARE * each * question.inference_tokens

    def left(limit: Limit) -> float:
        return limit.flops(spec.compute, flops_per_s) - (inference if limit.counts_inference else 0.0)

    limit = min(limits_of(spec), key=left)
    text = limit.describe(spec.compute, flops_per_s)
    if inference and limit.counts_inference:
        return f"({text} - {inference:.4g} of {question.inference_tokens:.4g} inference tokens)"
    return text


def _why_size(spec: ResolvedSpec, law: Law, question: Question, tokens: float, flops_per_s: float) -> tuple[str, str]:
    name = law.facts.name
    inference = f", {question.inference_tokens:.3g} inference tokens counted" if question.inference_tokens else ""
    if question.target_loss and question.tokens:
        return "law", f"{name}: a loss of {question.target_loss:g} on {question.tokens:.4g} tokens"
    if question.target_loss:
        return (
            "law",
            f"{name}: the cheapest run to a loss of {question.target_loss:g}, on about {tokens:.4g} tokens{inference}",
        )
    limits = " and ".join(limit.describe(spec.compute, flops_per_s) for limit in limits_of(spec))
    if question.tokens and question.limited:
        return "derived", f"{limits} / {question.tokens:.4g} tokens{inference}"
    served = (
        f", at most {question.most_parameters:.4g} parameters ({SERVED_BYTES} bytes each) in scaling.serving_memory"
        if math.isfinite(question.most_parameters)
        else ""
    )
    if question.tokens:
        return "law", f"{name}: best size for {question.tokens:.4g} tokens{inference}{served}"
    return "law", f"{name}: best size for {limits}{inference}{served}"


def _why_experts(question: Question, chosen: Variant, found: list[_Found]) -> str:
    if len(found) < 2:
        return ""
    what = "FLOPs" if question.target_loss else "loss"
    each = ", ".join(
        f"{one.variant.family.rules.num_experts}: {one.merit:.5g} at {format_quantity('parameters', one.total)}"
        for one in found
    )
    return f"{chosen.law.facts.name}: least {what} within scaling.serving_memory by number of experts ({each})"


def _require_answerable(spec: ResolvedSpec, law: Law, question: Question) -> None:
    what = needs_loss(question)
    reached = law.has_loss and question.target_loss and (question.parameters or question.tokens)
    if not what or law.minimises or reached:
        return
    path = "objective.target_loss" if question.target_loss else "scaling.inference_tokens"
    lacks = (
        "its loss is that of runs stopped early, not of its frontier; state model.size or data.tokens beside it"
        if law.has_loss and question.target_loss
        else f"it has no loss that could be weighed against {what}"
    )
    raise InfeasibleError(
        f"{place(spec, path)}: {law.facts.name} says which size is best for a budget: {lacks}; or take a law of the loss, such as"
        " scaling.law: epoch2024"
    )


def _explain_unreachable(
    spec: ResolvedSpec, variants: tuple[Variant, ...], question: Question, flops_per_s: float
) -> str:
    target, law = question.target_loss, variants[0].law
    if not target and not question.inference_tokens and question.parameters and not question.limited:
        return (
            f"{place(spec, 'data.unique_tokens', 'model.size')}: {question.parameters:,.0f} parameters are the best size for no"
            f" number of tokens: {law.facts.name} finds a smaller one better however often so few are repeated; state"
            " data.tokens, or lower model.size"
        )
    if not target and not question.inference_tokens:
        return _explain_absurd(spec, question, SMALLEST, flops_per_s)
    if not target:
        used = question.inference_tokens
        return (
            f"{place(spec, 'scaling.inference_tokens', 'compute.budget')}: {used:.3g} inference tokens take the whole budget of"
            f" {question.life_flops:.3g} FLOPs at every size; raise the budget, or lower the tokens"
        )
    where, least = place(spec, "objective.target_loss"), law.least_loss()
    if target <= least:
        return (
            f"{where}: {target:g} is not above {least:.4g}, the irreducible loss of {law.facts.name} ({law.facts.loss_unit}): no"
            f" model on any number of tokens reaches it; raise it by more than {least - target:.4g}, or take the law of your data"
        )
    most = min(question.most_parameters, LARGEST)
    endless = "any number of parameters"
    if question.parameters:
        pinned, endless, lever = f"{question.parameters:,.0f} parameters", "any number of tokens", "model.size"
    elif question.tokens and math.isfinite(question.most_parameters):
        pinned, endless = f"{question.tokens:.4g} tokens", f"at most {most:.4g} parameters"
        lever = "data.tokens or scaling.serving_memory"
    elif question.tokens:
        pinned, lever = f"{question.tokens:.4g} tokens", "data.tokens"
    elif math.isinf(question.most_parameters) and math.isfinite(spec.data.unique_tokens):
        pinned = f"{spec.data.unique_tokens:.4g} unique tokens, however often repeated,"
        lever = "data.unique_tokens"
    else:
        pinned, endless = f"{most:.4g} parameters", "any number of tokens"
        lever = "scaling.serving_memory" if math.isfinite(question.most_parameters) else "take the law of your data"
    total, tokens = np.array([question.parameters or most]), np.array([question.tokens or ENDLESS])
    floor = min(
        float(one.law.loss(one.sizes.at(one.sizes.counted(one.law.facts.counts), total), tokens)[0]) for one in variants
    )
    return (
        f"{where}: {target:g} cannot be reached with {pinned} on {endless}: {law.facts.name} leaves {floor:.4g};"
        f" raise the target above that, or {lever}"
    )


def _explain_absurd(spec: ResolvedSpec, question: Question, total: float, flops_per_s: float) -> str:
    path = place(spec, *(limit.path for limit in limits_of(spec)), "data.tokens", "objective.target_loss")
    bound, word = (SMALLEST, "fewer") if total < 1e9 else (LARGEST, "more")
    limits = (
        " and ".join(limit.describe(spec.compute, flops_per_s) for limit in limits_of(spec))
        or f"{question.tokens:.3g} tokens"
    )
    return f"{path}: {limits} ask for {word} than {bound:.0e} parameters, a size that no law here was made for; check the unit"
