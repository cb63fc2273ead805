"""The tuning stages of a plan: pins first, then what published recipes do; batches that the plan's layout can divide."""

from dataclasses import dataclass, replace

from trainwright.compiler.choose.kernels import SAVE_EVERY_S, round_down
from trainwright.compiler.choose.ledger import Ledger, Section
from trainwright.compiler.choose.recipes import BETA, MIN_RATE, NLL, RECIPES, SCHEDULE, WEIGHT_DECAY
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.plan import Data, Layout, Shape, Training, trained_identity, tuned_identity
from trainwright.compiler.plan_stages import Dpo, Sft, StagePlan, TuningSchedule
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.resolve_stages import ResolvedTuning

SAVE_EVERY_STEPS = 100
CONTEXTS_A_ROW = {"sft": 1, "dpo": 2}  # a row of dpo holds whole pairs, of which each answer may fill a context


@dataclass(frozen=True)
class Pretrained:
    """What of a plan is decided before its tuning stages."""

    shape: Shape
    data: Data
    training: Training
    layout: Layout
    step_s: float  # of pretraining, estimated


def choose_tunings(
    spec: ResolvedSpec, ledger: Ledger, before: Pretrained, stages: tuple[StagePlan, ...]
) -> tuple[tuple[Sft, ...], tuple[Dpo, ...]]:
    """The stages of kind sft and dpo, in executing order. Raises IllegalPlanError for a batch that cannot be divided."""
    given = {tuning.stage.name: tuning for tuning in spec.stages.tunings}
    shape, data, training = before.shape, before.data, before.training
    identities = {stage.name: trained_identity(shape, data, training) for stage in stages if stage.kind == "pretrain"}
    chosen: dict[str, list[Sft | Dpo]] = {"sft": [], "dpo": []}
    for stage in stages:
        if stage.name in given:
            kind = stage.kind
            section = Section(ledger, f"{kind}[{len(chosen[kind])}]", f"stages.{stage.name}")
            made = _choose_tuning(spec, section, before, given[stage.name])
            initial = identities.get(stage.initial, stage.initial)  # a path stands for itself
            made = replace(made, run_id=tuned_identity(initial, shape, data, training, made))
            identities[stage.name] = made.run_id
            chosen[kind].append(made)
    for kind, found in chosen.items():
        if not found:
            ledger.note(kind, None, "derived", f"the spec has no stage of kind {kind}")
    return (
        tuple(made for made in chosen["sft"] if isinstance(made, Sft)),
        tuple(made for made in chosen["dpo"] if isinstance(made, Dpo)),
    )


def _choose_tuning(spec: ResolvedSpec, section: Section, before: Pretrained, given: ResolvedTuning) -> Sft | Dpo:
    note, name, kind = section.note, given.stage.name, given.stage.kind
    note("stage", None, "pinned", "written under stages in the spec")
    note("run_id", None, "derived", "hash of the model that it starts from, its data as written, and its settings")
    stage, run_id = name, ""
    path = note("path", given.path, "derived", "a connector makes the records", key="data")
    connector = note("connector", given.connector, "derived", "read from a path")
    too_long = note(
        "too_long", given.too_long.pick("truncate"), "default", "the beginning is kept, and nothing dropped"
    )
    training = _choose_schedule(spec, section, before, given)
    if kind == "dpo":
        beta = note("beta", given.beta.clip(BETA.value), "default", BETA.text)
        nll = note("nll", given.nll.clip(NLL.value), "default", NLL.text)
        return Dpo(stage, run_id, path, connector, too_long, beta, nll, training)
    template = note("chat_template", given.chat_template, "default", "that of the model, else ChatML")
    return Sft(stage, run_id, path, connector, too_long, template, training)


def _choose_schedule(spec: ResolvedSpec, section: Section, before: Pretrained, given: ResolvedTuning) -> TuningSchedule:
    recipe, peak = RECIPES[given.stage.kind], before.training.learning_rate
    inner = replace(section, leaf=f"{section.leaf}.training")
    batch = _global_batch(spec, inner, before, given)
    share = recipe.rate_share
    text = f"{share.value:g} x training.learning_rate {peak:.4g}; {share.text}"
    rate = inner.note("learning_rate", given.learning_rate.clip(share.value * peak), "default", text)
    return TuningSchedule(
        epochs=inner.note("epochs", int(given.epochs.clip(recipe.epochs.value)), "default", recipe.epochs.text),
        global_batch=batch,
        micro_batch=_micro_batch(inner, before, given, batch),
        learning_rate=rate,
        min_learning_rate=inner.note(
            "min_learning_rate", given.min_learning_rate.clip(MIN_RATE.value), "default", MIN_RATE.text
        ),
        schedule=inner.note("schedule", given.schedule.pick("cosine"), "default", SCHEDULE),
        warmup=inner.note("warmup", given.warmup.clip(recipe.warmup.value), "default", recipe.warmup.text),
        weight_decay=inner.note(
            "weight_decay", given.weight_decay.clip(WEIGHT_DECAY.value), "default", WEIGHT_DECAY.text
        ),
        checkpoint_every_steps=_cadence(inner, before, given, batch),
    )


def _global_batch(spec: ResolvedSpec, section: Section, before: Pretrained, given: ResolvedTuning) -> int:
    """Rows a step: a multiple of the data-parallel degree."""
    data, usual = before.layout.data, RECIPES[given.stage.kind].global_batch
    wanted = given.global_batch.clip(min(usual.value, before.training.global_batch))
    if given.global_batch.pinned and given.global_batch_unit == "tokens":
        wanted /= CONTEXTS_A_ROW[given.stage.kind] * before.training.context_length
    batch = max(1, round(wanted / data)) * data
    if given.global_batch.pinned and given.global_batch_unit == "sequences" and batch != wanted:
        near = sorted({max(1, int(wanted // data)) * data, -(-int(wanted) // data) * data})
        path = f"{section.pin}.global_batch"
        raise IllegalPlanError(
            f"{spec.pins.get(path, 'the spec')}: {path}: {wanted:.0f} sequences / data {data} = {wanted / data:.4g} a device, "
            f"and only whole ones exist; take {' or '.join(map(str, near))}, or pin layout.data"
        )
    rounding = f"; {wanted:.4g} rows, rounded to a multiple of data {data}" if batch != wanted else ""
    return section.note("global_batch", batch, "default", usual.text + rounding, detail=rounding)


def _micro_batch(section: Section, before: Pretrained, given: ResolvedTuning, batch: int) -> int:
    """Rows that a device computes at once: what fits in pretraining, in tokens, if a row does; and whole micro-batches."""
    layout, contexts = before.layout, CONTEXTS_A_ROW[given.stage.kind]
    most, a_device = max(1, layout.micro_batch // contexts), batch // layout.data
    fitting = list_divisors(a_device, most)[-1]
    size = "a context" if contexts == 1 else f"{contexts} contexts"
    text = (
        f"the largest divisor of the {a_device} rows a device (global_batch {batch} / data {layout.data}) with at most the tokens"
        f" of layout.micro_batch {layout.micro_batch}; a row is {size} long"
    )
    return section.note("micro_batch", fitting, "derived", text)


def _cadence(section: Section, before: Pretrained, given: ResolvedTuning, batch: int) -> int:
    """Steps between checkpoints."""
    tokens = batch * CONTEXTS_A_ROW[given.stage.kind] * before.training.context_length
    step_s = before.step_s * tokens / before.training.tokens_per_step
    text = (
        f"at most {SAVE_EVERY_S / 60:.0f} minutes of steps of about {step_s:.2g} s, and at most {SAVE_EVERY_STEPS} steps: how"
        " many there are follows from the data, often a few hundred; the last step is always saved"
    )
    every = max(1, min(round_down(SAVE_EVERY_S / step_s), SAVE_EVERY_STEPS))
    return section.note("checkpoint_every_steps", every, "derived", text)
