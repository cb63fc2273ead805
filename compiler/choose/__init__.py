"""ResolvedSpec -> Plan: enumerate candidates, drop illegal ones, estimate, rank, take the first.

A limit in time or money buys FLOPs by the utilisation of the layout that is chosen, the layout depends on the shape, and
the shape on the FLOPs. `choose_plan` shows that loop; it ends when shape and steps repeat. Where they never do, since a longer
run takes a larger batch and with it another utilisation, it halves the gap between what keeps the limits and what does not. Of
all rounds that keep them, the one that trains most is taken.
"""

import math

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose.assemble import assemble_plan
from trainwright.compiler.choose.candidate import Candidate, need_of
from trainwright.compiler.choose.kernels import fuses_activation, gradient_bytes
from trainwright.compiler.choose.layout import choose_layout
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.limits import depends_on_layout, exceeded, place, require_limits
from trainwright.compiler.choose.question import Question
from trainwright.compiler.choose.shape import choose_shape_within, find_published, pinned_shape
from trainwright.compiler.choose.sizing import Answer, Sizing, ask, choose_size, choose_token_budget
from trainwright.compiler.choose.training import choose_training
from trainwright.compiler.choose.variants import Variant, list_variants, most_parameters, require_served
from trainwright.compiler.choose.warnings import list_warnings
from trainwright.compiler.errors import IllegalPlanError, InfeasibleError
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.plan import Plan, Round, Shape, round_leaf
from trainwright.compiler.ramp import batch_unit
from trainwright.compiler.resolve import ResolvedSpec

# Of the peak, before the first layout is known.
FIRST_UTILISATION = 0.4
BISECT_AFTER = 10  # rounds: shapes, or batches, that lead to each other would alternate for ever
CLOSE = 1.002  # times apart: a FLOP/s that keeps the limits, and one that does not
ROUNDS = 40
SHRINK = 0.97  # of the size, or the FLOP/s, while it still takes more than a limit allows
SIZE_PINS = ("model.size", "data.tokens", "objective.target_loss", "compute.budget", "objective.deadline")
LAYOUT_PINS = tuple(
    f"layout.{name}"
    for name in (
        *("tensor", "pipeline", "data", "micro_batch", "virtual_pipeline", "context", "expert", "expert_tensor"),
        *("first_stage_layers", "last_stage_layers", "embedding_as_layer", "loss_as_layer", "sequence_parallel"),
        *("recompute", "recompute_modules", "recompute_layers"),
    )
)


def choose_plan(spec: ResolvedSpec) -> Plan:
    """The plan of a spec. Raises InfeasibleError (nothing fits, or a limit is too tight), IllegalPlanError (a broken rule)."""
    variants = list_variants(spec, _vocab_size(spec), _context_length(spec))
    peak = spec.compute.device.peak_flops_per_s[_precision(spec)]
    flops_per_s = FIRST_UTILISATION * peak * spec.compute.devices
    chosen = _choose(spec, variants, flops_per_s)
    tried = [(flops_per_s, chosen)]
    while depends_on_layout(spec) and len(tried) < ROUNDS:
        bisects = len(tried) > BISECT_AFTER
        previous, flops_per_s = chosen, _between(spec, tried) if bisects else chosen.flops_per_s
        if bisects and any(rate == flops_per_s for rate, _ in tried):
            break
        chosen = _choose(spec, variants, flops_per_s)
        tried.append((flops_per_s, chosen))
        if chosen.same(previous) and not bisects:
            break
    # With the tokens pinned the size answers for the limits, and shapes come in steps: the largest is made smaller below.
    kept = [one for one in tried if _shrinks(spec) or not exceeded(spec, one[1].need)]
    if depends_on_layout(spec) and kept and not spec.objective.target_loss:
        best = max(kept, key=lambda one: one[1].need.training_flops)
        if not best[1].same(chosen):
            flops_per_s, chosen = best
            tried.append(best)
    share = 1.0
    while _shrinks(spec) and exceeded(spec, chosen.need):
        share *= SHRINK
        chosen = _choose(spec, variants, flops_per_s, share)
        tried.append((flops_per_s, chosen))
    require_limits(spec, chosen.need)
    plan = assemble_plan(spec, chosen, tuple(_round(rate, one) for rate, one in tried))
    violations = check_plan(plan)
    if violations:
        raise IllegalPlanError("the plan breaks rules of legality:\n" + "\n".join(f"  {line}" for line in violations))
    return plan


def _choose(spec: ResolvedSpec, variants: tuple[Variant, ...], flops_per_s: float, share: float = 1.0) -> Candidate:
    """One round. `share`: of the parameters wanted that the shape is to have."""
    ledger, context = Ledger(spec.pins), _context_length(spec)
    custom = f"{spec.model.family.name}'s main pretraining: {spec.model.family.source}"
    ledger.note("training.context_length", context, "fact", custom, pin="model.context_length")
    question = ask(spec, flops_per_s)
    sizing = _sizing(spec, variants, question, flops_per_s)
    shape = _shape(spec, ledger, sizing, context, share)
    parameters = count_parameters(shape, context)
    require_served(spec, parameters)
    answer = choose_token_budget(spec, sizing.variant, question, shape, context, flops_per_s)
    whole = answer.value if answer.kind == "pinned" else round_leaf(answer.value)
    if whole > answer.value and answer.kind == "derived":  # what a limit buys is rounded down
        whole -= 10 ** (math.floor(math.log10(whole)) - 5)
    tokens = ledger.note("data.budget_tokens", max(1, int(whole)), answer.kind, answer.text, pin="data.tokens")
    training, warnings = choose_training(spec, ledger, shape, tokens, context, _precision(spec))
    if not _shrinks(spec):  # a loss, or size and tokens: no other layout makes them cheaper
        require_limits(spec, need_of(shape, training, question))
    cuda = spec.compute.device.kind == "cuda"
    workload = Workload(
        shape=shape,
        context_length=context,
        precision=training.precision,
        device=spec.compute.device,
        devices_per_node=spec.compute.devices_per_node,
        nodes=spec.compute.nodes,
        fused_activation=fuses_activation(shape, cuda),
        local_layers=not cuda or spec.layout.layer_spec.values[0] == "local",
        overlap=cuda,
        optimizer=training.optimizer,
        gradient_bytes=gradient_bytes(spec.layout),
    )
    try:
        layouts = choose_layout(workload, training.global_batch, spec.layout, batch_unit(training))
    except InfeasibleError as error:
        why = (
            f"\nthe size was chosen: {sizing.parameters.text}; model.size states it" if spec.model.size_is_open else ""
        )
        raise InfeasibleError(f"{place(spec, *LAYOUT_PINS, 'compute.nodes')}: {error}{why}") from error
    return Candidate(
        ledger=ledger,
        question=question,
        variant=sizing.variant,
        shape=shape,
        tokens=tokens,
        training=training,
        workload=workload,
        layouts=layouts,
        warnings=(*list_warnings(spec, sizing.variant, shape, tokens, context), *warnings),
    )


def _between(spec: ResolvedSpec, tried: list[tuple[float, Candidate]]) -> float:
    """FLOP/s to assume where none gives itself back: between the most with which the limits were kept and the least above it with
    which they were not; the former once they are close, and below all of them while none kept the limits."""
    over = [rate for rate, one in tried if exceeded(spec, one.need)]
    kept = max((rate for rate, one in tried if not exceeded(spec, one.need)), default=0.0)
    above = min((rate for rate in over if rate > kept), default=kept)
    if not kept:
        return SHRINK * above
    return math.sqrt(kept * above) if above > CLOSE * kept else kept


def _round(flops_per_s: float, chosen: Candidate) -> Round:
    return Round(
        flops_per_s=round_leaf(flops_per_s),
        parameters=count_parameters(chosen.shape, chosen.training.context_length),
        tokens=chosen.tokens,
        step_s=round_leaf(chosen.layouts.step_s),
        reached_flops_per_s=round_leaf(chosen.flops_per_s),
    )


def _sizing(spec: ResolvedSpec, variants: tuple[Variant, ...], question: Question, flops_per_s: float) -> Sizing:
    if spec.model.shape:
        return Sizing(variants[0], Answer(math.nan, "pinned", "model.shape"), "")
    return choose_size(spec, variants, question, flops_per_s)


def _shape(spec: ResolvedSpec, ledger: Ledger, sizing: Sizing, context: int, share: float) -> Shape:
    family, vocab_size, wanted = sizing.variant.family, _vocab_size(spec), ""
    if spec.model.shape:
        choice = pinned_shape(family, spec.model.shape[0], vocab_size, context)
    else:
        size = sizing.parameters
        try:
            choice = choose_shape_within(family, share * size.value, vocab_size, context, most_parameters(spec))
        except InfeasibleError as error:
            why = "" if size.kind == "pinned" else f"\nthe size was chosen: {size.text}; model.size states it"
            raise InfeasibleError(f"{place(spec, *SIZE_PINS)}: {error}{why}") from error
        wanted = f"; {size.value:,.0f} parameters wanted: {size.text}"
    for path, reason in choice.reasons.items():
        name = path.removeprefix("shape.")
        pins = {"family": "model.family", "vocab_size": "model.vocab_size", "num_experts": "model.num_experts"}
        pins |= {key: f"model.{key}" for key in ("positions", "rotary_scaling", "mtp_layers")}
        pin = pins.get(name, f"model.shape.{name}")
        searched = reason.kind == "search"
        ledger.note(path, None, reason.kind, reason.text + wanted if searched else reason.text, pin=pin)
    if sizing.experts:
        ledger.note("shape.num_experts", None, "law", sizing.experts)
    return choice.shape


def _precision(spec: ResolvedSpec) -> str:
    return spec.model.precision.pick("bf16")


def _context_length(spec: ResolvedSpec) -> int:
    return int(spec.model.context_length.clip(spec.model.family.rules.context_length))


def _vocab_size(spec: ResolvedSpec) -> int:
    """As pinned; else that of the published size that is asked for, or the family's."""
    published = find_published(spec.model.family, spec.model.size) if spec.model.size.pinned else ()
    usual = published[0].vocab_size if published else spec.model.family.rules.vocab_size
    return int(spec.model.vocab_size.clip(usual))


def _shrinks(spec: ResolvedSpec) -> bool:
    """Whether a smaller size answers for a limit that is not kept."""
    return spec.data.tokens.pinned and spec.model.size_is_open and not spec.objective.target_loss
