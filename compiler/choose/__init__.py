"""ResolvedSpec -> Plan: enumerate candidates, drop illegal ones, estimate, rank, take the first.

A budget in time or money buys FLOPs by the utilisation of the layout that is chosen, the layout depends on the shape, and
the shape on the FLOPs. `choose_plan` shows that loop; it ends when shape and steps repeat.
"""

import math
from dataclasses import dataclass

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose.budget import list_extrapolations
from trainwright.compiler.choose.estimates import make_estimates
from trainwright.compiler.choose.kernels import choose_kernels, fuses_activation
from trainwright.compiler.choose.layout import LayoutChoice, choose_layout
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.question import budget_s, choose_size, choose_token_budget
from trainwright.compiler.choose.shape import choose_shape, pinned_shape
from trainwright.compiler.choose.stages import choose_stages
from trainwright.compiler.choose.training import choose_evaluation, choose_training
from trainwright.compiler.errors import IllegalPlanError, InfeasibleError
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import LossLaw, find_loss_law
from trainwright.compiler.plan import (
    SCHEMA_VERSION,
    Cluster,
    Data,
    Plan,
    Shape,
    Training,
    round_leaf,
    trained_identity,
)
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_quantity

LOSS_LAW = "chinchilla_refit"
FIRST_UTILISATION = (
    0.4  # of the peak, before the first layout is known; where the loop starts does not change where it ends
)
FREEZE_SHAPE_AFTER = 10  # rounds: two shapes that lead to each other would alternate for ever
ROUNDS = 40
SHRINK = 0.97  # of what a budget seems to buy, while the shape for it still overspends
# Held out of the documents' groups: 12 % for the final test and 4 % for validation leave 84 % for training (custom, no law).
TEST_FRACTION, VALIDATION_FRACTION = 0.12, 0.04
LAYOUT_PINS = tuple(f"layout.{name}" for name in ("tensor", "pipeline", "data", "micro_batch", "recompute"))


@dataclass(frozen=True)
class _Candidate:
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

    def same(self, other: "_Candidate") -> bool:
        return self.shape == other.shape and self.training == other.training


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
    # With the tokens pinned the size answers for the budget, and shapes come in steps: take the first that it pays for.
    flops_per_s = chosen.flops_per_s
    while spec.data.tokens.pinned and not _size_is_pinned(spec) and _needed(spec, chosen) > _allowed(spec):
        flops_per_s *= SHRINK
        chosen = _choose(spec, law, flops_per_s, ())
    _require_budget(spec, chosen)
    plan = _assemble(spec, law, chosen)
    violations = check_plan(plan)
    if violations:
        raise IllegalPlanError("the plan breaks rules of legality:\n" + "\n".join(f"  {line}" for line in violations))
    return plan


def _choose(spec: ResolvedSpec, law: LossLaw, flops_per_s: float, frozen: tuple[Shape, ...]) -> _Candidate:
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
        raise InfeasibleError(f"{_place(spec, *LAYOUT_PINS, 'compute.nodes')}: {error}{why}") from error
    outside = (*list_extrapolations(law, parameters, tokens), *warnings)
    return _Candidate(ledger, shape, tokens, training, workload, layouts, outside)


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
            raise InfeasibleError(f"{_place(spec, 'model.size', 'data.tokens', 'compute.budget')}: {error}") from error
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


def _place(spec: ResolvedSpec, *paths: str) -> str:
    """The first of these spec paths that the user wrote, with its place: what stands in the way."""
    path = next((path for path in paths if path in spec.pins), paths[-1])
    return f"{spec.pins[path]}: {path}" if path in spec.pins else path


def _size_is_pinned(spec: ResolvedSpec) -> bool:
    return spec.model.size.pinned or bool(spec.model.shape)


def _allowed(spec: ResolvedSpec) -> float:
    """The budget's amount in its own unit; infinite without one. Figures are rounded to 6 digits, so a millionth is let pass."""
    budget = spec.compute.budget
    return math.inf if budget.kind == "none" else budget.amount * (1 + 1e-6)


def _needed(spec: ResolvedSpec, chosen: _Candidate) -> float:
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


def _require_budget(spec: ResolvedSpec, chosen: _Candidate) -> None:
    """Refuse a run that the budget does not pay for: a spec that pins size and tokens can ask for one."""
    needed, compute, kind = _needed(spec, chosen), spec.compute, spec.compute.budget.kind
    if needed <= _allowed(spec):
        return
    wanted, allowed = format_quantity(kind, needed), format_quantity(kind, compute.budget.amount)
    over = format_quantity(kind, needed - compute.budget.amount)
    raise InfeasibleError(
        f"{_place(spec, 'compute.budget')}: {chosen.training.steps:,} steps x {chosen.layouts.step_s:.3g} s on "
        f"{compute.devices} x {compute.device.name} need {wanted}, the budget is {allowed}: {over} too much; "
        "lower data.tokens or model.size, add devices, or raise the budget"
    )


def _assemble(spec: ResolvedSpec, law: LossLaw, chosen: _Candidate) -> Plan:
    ledger, compute = chosen.ledger, spec.compute
    stages = choose_stages(spec.stages)
    for index, stage in enumerate(stages):
        written = dict(spec.stages).get(stage.name)
        place = spec.pins.get(f"stages.{stage.name}", "the spec")
        text = f"written under stages in {place}" if written else "nobody wrote it; a later stage needs it"
        for leaf in ("name", "kind", "implied"):
            ledger.note(f"stages[{index}].{leaf}", None, "pinned" if written else "derived", text)
        for leaf in [f"needs[{n}]" for n in range(len(stage.needs))] or ["needs"]:
            ledger.note(f"stages[{index}].{leaf}", None, "derived", f"what a stage of kind {stage.kind} reads")
    data = _data(spec, ledger, chosen.tokens)
    layout = chosen.layouts.ranked.row(0)
    for path, reason in chosen.layouts.reasons.items():
        ledger.note(path, None, reason.kind, reason.text, pin=path)
    kernels = choose_kernels(
        ledger,
        cuda=compute.device.kind == "cuda",
        layer_spec=spec.layout.layer_spec.values[0],
        precision=chosen.training.precision,
        shape=chosen.shape,
        layout=layout,
        steps=chosen.training.steps,
        step_s=chosen.layouts.step_s,
    )
    price = compute.price_usd_per_device_hour
    cluster = Cluster(
        device=ledger.note("cluster.device", compute.device.name, "pinned", "compute.device", pin="compute.device"),
        nodes=ledger.note("cluster.nodes", compute.nodes, "pinned", "compute.nodes", pin="compute.nodes"),
        devices_per_node=ledger.note(
            "cluster.devices_per_node", compute.devices_per_node, "pinned", "", pin="compute.devices_per_node"
        ),
        price_usd_per_device_hour=ledger.note(
            "cluster.price_usd_per_device_hour", price, "default", "no price is stated: no cost", pin="cluster.price"
        ),
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        name=spec.name,
        run_id=trained_identity(chosen.shape, data, chosen.training),
        overrides=spec.overrides,
        shape=chosen.shape,
        data=data,
        training=chosen.training,
        evaluation=choose_evaluation(spec, ledger, chosen.training),
        stages=stages,
        layout=layout,
        kernels=kernels,
        cluster=cluster,
        estimates=make_estimates(chosen.workload, chosen.layouts.ranked, chosen.training, law, price, chosen.warnings),
        reasons=ledger.reasons,
    )


def _data(spec: ResolvedSpec, ledger: Ledger, tokens: int) -> Data:
    given = spec.data
    for index, source in enumerate(given.sources):
        prefix = f"data.sources[{index}]"
        ledger.note(f"{prefix}.name", source.name, "pinned", "", pin=f"{prefix}.name")
        ledger.note(f"{prefix}.path", source.path, "derived", "a connector makes the text", pin=f"{prefix}.path")
        ledger.note(f"{prefix}.connector", source.connector, "derived", "read from a path", pin=f"{prefix}.connector")
        ledger.note(f"{prefix}.weight", source.weight, "default", "in proportion to tokens", pin=f"{prefix}.weight")
    custom = "a custom, no law: as much as leaves the rest for training"
    return Data(
        root=ledger.note("data.root", given.root, "default", "where the run is started", pin="data.root"),
        sources=given.sources,
        mixture=ledger.note(
            "data.mixture",
            given.mixture,
            "derived",
            "weights are given" if given.mixture == "weighted" else "no weights are given: in proportion to tokens",
        ),
        budget_tokens=tokens,
        validation_fraction=ledger.note(
            "data.validation_fraction",
            given.validation_fraction.clip(VALIDATION_FRACTION),
            "default",
            custom,
            pin="data.validation",
        ),
        test_fraction=ledger.note(
            "data.test_fraction", given.test_fraction.clip(TEST_FRACTION), "default", custom, pin="data.test"
        ),
        tokenizer=ledger.note("data.tokenizer", "byte_bpe", "default", "spells every text, and is what Llama 3 uses"),
    )
