"""The families and laws that a question is asked of: one of a dense model, one a number of experts of a mixture."""

import math
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.limits import place
from trainwright.compiler.choose.shape import with_experts
from trainwright.compiler.choose.sizes import Sizes, tabulate_sizes
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.params import count_as
from trainwright.compiler.facts import COUNTS, Family
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw
from trainwright.compiler.plan import Shape
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_quantity

# Experts for each that a token uses: what Ludziejewski et al. 2025 trained.
EXPANSIONS = (2, 4, 8, 16, 32)
SERVED_BYTES = 2  # a parameter: bf16


@dataclass(frozen=True)
class Variant:
    """A family, and the law that answers for it."""

    family: Family
    law: Law
    sizes: Sizes


def list_variants(spec: ResolvedSpec, vocab_size: int, context_length: int) -> tuple[Variant, ...]:
    """One variant; of a mixture whose number of experts is open, one each of EXPANSIONS."""
    return tuple(_variant(spec, number, vocab_size, context_length) for number in _numbers_of_experts(spec))


def _numbers_of_experts(spec: ResolvedSpec) -> tuple[int, ...]:
    """The family's own, unless another is pinned, or a memory for serving leaves it to the law."""
    rules, given = spec.model.family.rules, spec.model.num_experts
    if given.pinned:
        return (int(given.low),)
    if rules.num_experts and math.isfinite(spec.scaling.serving_memory_bytes) and spec.model.size_is_open:
        return tuple(rules.experts_per_token * expansion for expansion in EXPANSIONS)
    return (rules.num_experts,)


def _variant(spec: ResolvedSpec, num_experts: int, vocab_size: int, context_length: int) -> Variant:
    family, law = with_experts(spec.model.family, num_experts), spec.scaling.law
    if isinstance(law, RepeatedDataLaw) and math.isfinite(spec.data.unique_tokens):
        law = law.with_unique_tokens(spec.data.unique_tokens)
    if isinstance(law, ExpertsLaw):
        law = law.with_experts(num_experts / family.rules.experts_per_token if num_experts else 1.0)
    return Variant(family, law, tabulate_sizes(family, num_experts, vocab_size, context_length))


def sizes_of(shape: Shape, context_length: int) -> Sizes:
    """The row of a real shape: exact counts and FLOPs."""
    columns = {counts: np.array([count_as(counts, shape, context_length)]) for counts in COUNTS}
    return Sizes(**columns, flops_per_token=np.array([model_flops_per_token(shape, context_length)]))


def most_parameters(spec: ResolvedSpec) -> float:
    """Parameters that the memory where the model is served holds; infinite without such a limit."""
    return spec.scaling.serving_memory_bytes / SERVED_BYTES


def require_served(spec: ResolvedSpec, parameters: int) -> None:
    """Refuse a size that is pinned and that the memory where it is served does not hold."""
    memory, needed = spec.scaling.serving_memory_bytes, SERVED_BYTES * parameters
    if needed <= memory:
        return
    wanted, allowed = format_quantity("bytes", needed), format_quantity("bytes", memory)
    raise InfeasibleError(
        f"{place(spec, 'scaling.serving_memory')}: {parameters:,} parameters x {SERVED_BYTES} bytes = {wanted}, and"
        f" serving_memory is {allowed}; raise it, or lower model.size"
    )
