"""What a plan asks of a law beyond what it was fitted on."""

import math

from trainwright.compiler.choose.variants import EXPANSIONS, Variant
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.params import count_as
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw
from trainwright.compiler.plan import Shape
from trainwright.compiler.resolve import ResolvedSpec

# Epochs: up to 4 nearly as good as fresh tokens, from 40 on without effect (Muennighoff et al. 2023, arXiv 2305.16264).
MANY_EPOCHS, MOST_EPOCHS = 4, 40
RARELY = 0.05  # of the draws


def list_warnings(spec: ResolvedSpec, variant: Variant, shape: Shape, tokens: int, context_length: int) -> list[str]:
    """Warnings about size and tokens: outside a law's range, repeated data, dense laws for mixtures of experts."""
    law = variant.law
    counted = count_as(law.facts.counts, shape, context_length)
    warnings = list(law.extrapolations(counted, float(tokens), model_flops_per_token(shape, context_length) * tokens))
    if shape.num_experts and not isinstance(law, ExpertsLaw):
        warnings.append(f"{law.facts.name} was fitted on dense models, and {shape.family} is a mixture of experts")
    if isinstance(law, ExpertsLaw) and shape.experts_per_token > 1:
        ratio = shape.num_experts / shape.experts_per_token
        warnings.append(
            f"{law.facts.name} was fitted on experts of which a token uses one; {shape.num_experts} of which it uses"
            f" {shape.experts_per_token} are taken for {ratio:g}"
        )
    if isinstance(law, ExpertsLaw) and law.experts > EXPANSIONS[-1]:
        warnings.append(
            f"{law.facts.name} was fitted on at most {EXPANSIONS[-1]} experts for each that a token uses; {law.experts:g} are"
            " outside: what it says there is a guess"
        )
    unique = spec.data.unique_tokens
    if math.isfinite(unique) and tokens > unique:
        warnings += _repeats(tokens / unique, isinstance(law, RepeatedDataLaw), law.facts.name)
    return warnings


def warn_of_target(law: Law, target_loss: float, unanswered: float) -> list[str]:
    """How sure it is that a target loss (0.0: none) can be reached at all; `unanswered`: the share of refits in which not."""
    if not target_loss or unanswered <= RARELY:
        return []
    text = f"in {unanswered:.0%} of refits of {law.facts.name} to resampled runs no run reaches a loss of {target_loss:g}: it is "
    return [text + "close to the least that there is"]


def _repeats(epochs: float, known: bool, name: str) -> list[str]:
    seen = f"{epochs:.3g} epochs of data.unique_tokens"
    if not known:
        return [f"{seen}, and {name} takes every token for a fresh one; muennighoff2023 does not"]
    if epochs > MOST_EPOCHS:
        return [f"{seen}: beyond about {MOST_EPOCHS} more of them teach nothing (muennighoff2023)"]
    if epochs > MANY_EPOCHS:
        return [f"{seen}: beyond about {MANY_EPOCHS} a repeated token is worth visibly less (muennighoff2023)"]
    return []
