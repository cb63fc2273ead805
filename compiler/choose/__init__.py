"""ResolvedSpec -> Plan: enumerate candidates, drop illegal ones, estimate, rank, take the first.

A budget in time or money buys FLOPs by the utilisation of the layout that is chosen, the layout depends on the shape, and
the shape on the FLOPs. `choose_plan` shows that loop; it ends when shape and steps repeat.
"""

from dataclasses import replace

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose.assemble import assemble_plan
from trainwright.compiler.choose.budget import list_extrapolations
from trainwright.compiler.choose.candidate import Candidate, allowed_amount, needed_amount, place, require_budget
from trainwright.compiler.choose.kernels import fuses_activation
from trainwright.compiler.choose.layout import choose_layout
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.question import budget_s, choose_size, choose_token_budget
from trainwright.compiler.choose.shape import choose_shape, pinned_shape
from trainwright.compiler.choose.training import choose_training
from trainwright.compiler.errors import IllegalPlanError, InfeasibleError
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import LossLaw, find_loss_law
from trainwright.compiler.plan import Plan, Shape, round_leaf
from trainwright.compiler.resolve import ResolvedSpec

LOSS_LAW = "chinchilla_refit"
# Of the peak, before the first layout is known.
FIRST_UTILISATION = 0.4
FREEZE_SHAPE_AFTER = 10  # rounds: two shapes that lead to each other would alternate for ever
ROUNDS = 40
SHRINK = 0.97  # of what a budget seems to buy, while the shape for it still overspends
LAYOUT_PINS = tuple(f"layout.{name}" for name in ("tensor", "pipeline", "data", "micro_batch", "recompute"))


def choose_plan(spec: ResolvedSpec) -> Plan:
    """The plan of a spec. Raises InfeasibleError (nothing fits, or the budget is too small), IllegalPlanError (a broken rule)."""
    law = find_loss_law(LOSS_LAW)
    peak = spec.compute.device.peak_flops_per_s[_precision(spec)]
    flops_per_s = FIRST_UTILISATION * peak * spec.compute.devices
    chosen = _choose(spec, law, flops_per_s, ())
    for round_ in range(ROUNDS if budget_s(spec) else 0):
        frozen = (chosen.shape,) if round_ >= FREEZE_SHAPE_AFTER else ()
        previous, chosen = chosen, _choose(spec, law, chosen.flops_per_s, frozen)
        if chosen.same(previous):
            break
    else:
        if budget_s(spec):
            unsettled = f"budget and layout did not settle in {ROUNDS} rounds; this is the last"
            chosen = replace(chosen, warnings=(*chosen.warnings, unsettled))
    # With the tokens pinned the size answers for the budget, and shapes come in steps: take the first that it pays for.
    flops_per_s = chosen.flops_per_s
    while spec.data.tokens.pinned and not _size_is_pinned(spec) and needed_amount(spec, chosen) > allowed_amount(spec):
        flops_per_s *= SHRINK
        chosen = _choose(spec, law, flops_per_s, ())
    require_budget(spec, chosen)
    plan = assemble_plan(spec, law, chosen)
    violations = check_plan(plan)
    if violations:
        raise IllegalPlanError("the plan breaks rules of legality:\n" + "\n".join(f"  {line}" for line in violations))
    return plan


def _choose(spec: ResolvedSpec, law: LossLaw, flops_per_s: float, frozen: tuple[Shape, ...]) -> Candidate:
    ledger = Ledger(spec.pins)
    context = _context_length(spec, ledger)
    vocab_size = int(spec.model.vocab_size.clip(spec.model.family.rules.vocab_size))
    shape = _shape(spec, ledger, law, flops_per_s, vocab_size, context, frozen)
    parameters = count_parameters(shape, context)
    answer = choose_token_budget(spec, law, shape, parameters, context, flops_per_s)
    whole = answer.value if spec.data.tokens.pinned else round_leaf(answer.value)
    tokens = ledger.note("data.budget_tokens", max(1, int(whole)), answer.kind, answer.text, pin="data.tokens")
    training, warnings = choose_training(spec, ledger, shape, tokens, context, _precision(spec))
    cuda = spec.compute.device.kind == "cuda"
    workload = Workload(
        shape=shape,
        context_length=context,
        precision=training.precision,
        device=spec.compute.device,
        devices_per_node=spec.compute.devices_per_node,
        nodes=spec.compute.nodes,
        fused_activation=fuses_activation(shape, cuda),
        overlap=cuda,
    )
    try:
        layouts = choose_layout(workload, training.global_batch, spec.layout)
    except InfeasibleError as error:
        why = (
            ""
            if _size_is_pinned(spec)
            else f"\nthe size was chosen: {choose_size(spec, law, flops_per_s).text}; model.size states it"
        )
        raise InfeasibleError(f"{place(spec, *LAYOUT_PINS, 'compute.nodes')}: {error}{why}") from error
    outside = (*list_extrapolations(law, parameters, tokens), *warnings)
    return Candidate(ledger, shape, tokens, training, workload, layouts, outside)


def _shape(
    spec: ResolvedSpec,
    ledger: Ledger,
    law: LossLaw,
    flops_per_s: float,
    vocab_size: int,
    context: int,
    frozen: tuple[Shape, ...],
) -> Shape:
    family, wanted = spec.model.family, ""
    if spec.model.shape:
        choice = pinned_shape(family, spec.model.shape[0], vocab_size, context)
    else:
        size = choose_size(spec, law, flops_per_s)
        try:
            choice = choose_shape(family, size.value, vocab_size, context)
        except InfeasibleError as error:
            raise InfeasibleError(f"{place(spec, 'model.size', 'data.tokens', 'compute.budget')}: {error}") from error
        wanted = f"; {size.value:,.0f} parameters wanted: {size.text}"
    for path, reason in choice.reasons.items():
        name = path.removeprefix("shape.")
        pin = {"family": "model.family", "vocab_size": "model.vocab_size"}.get(name, f"model.shape.{name}")
        searched = reason.kind == "search"
        ledger.note(path, None, reason.kind, reason.text + wanted if searched else reason.text, pin=pin)
    return frozen[0] if frozen else choice.shape


def _precision(spec: ResolvedSpec) -> str:
    return spec.model.precision.pick("bf16")


def _context_length(spec: ResolvedSpec, ledger: Ledger) -> int:
    family = spec.model.family
    context = int(spec.model.context_length.clip(family.rules.context_length))
    text = f"{family.name}'s main pretraining: {family.source}"
    return ledger.note("training.context_length", context, "fact", text, pin="model.context_length")


def _size_is_pinned(spec: ResolvedSpec) -> bool:
    return spec.model.size.pinned or bool(spec.model.shape)
