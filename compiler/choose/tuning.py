"""The tuning stages of a plan: pins first, then what published recipes do for a model of the size."""

from dataclasses import dataclass, replace

from trainwright.compiler.choose.ledger import Ledger, Section
from trainwright.compiler.choose.recipes import suggest_for_size, suggest_learning_rate
from trainwright.compiler.choose.tuning_batch import (
    Batching,
    choose_cadence,
    choose_micro_batch,
    choose_minibatch,
    choose_rows,
    choose_samples,
)
from trainwright.compiler.choose.tuning_volume import choose_volume
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import find_recipe
from trainwright.compiler.plan import Data, Layout, Shape, Training, trained_identity, tuned_identity
from trainwright.compiler.plan_stages import Dpo, Grpo, Ppo, Reward, Sft, StagePlan, Tuned, TuningSchedule
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.resolve_stages import ResolvedTuning
from trainwright.compiler.spec_stages import TUNING_KINDS, VERIFIER


@dataclass(frozen=True)
class Pretrained:
    """What of a plan is decided before its tuning stages."""

    shape: Shape
    data: Data
    training: Training
    layout: Layout
    step_s: float  # of pretraining, estimated


@dataclass(frozen=True)
class Tunings:
    """The tuning stages of a plan by kind, each kind in executing order."""

    sft: tuple[Sft, ...]
    reward: tuple[Reward, ...]
    dpo: tuple[Dpo, ...]
    ppo: tuple[Ppo, ...]
    grpo: tuple[Grpo, ...]

    @property
    def all(self) -> tuple[Tuned, ...]:
        return (*self.sft, *self.reward, *self.dpo, *self.ppo, *self.grpo)


def choose_tunings(spec: ResolvedSpec, ledger: Ledger, before: Pretrained, stages: tuple[StagePlan, ...]) -> Tunings:
    """The tuning stages. Raises IllegalPlanError for a batch that cannot be divided, and for lengths beyond the context."""
    given = {tuning.stage.name: tuning for tuning in spec.stages.tunings}
    shape, data, training = before.shape, before.data, before.training
    identities = {stage.name: trained_identity(shape, data, training) for stage in stages if stage.kind == "pretrain"}
    chosen: dict[str, list[Tuned]] = {kind: [] for kind in TUNING_KINDS}
    for stage in stages:
        if stage.name in given:
            kind, one = stage.kind, given[stage.name]
            section = Section(ledger, f"{kind}[{len(chosen[kind])}]", f"stages.{stage.name}")
            made = _choose_tuning(section, before, one)
            initial, reward = (identities.get(name, name) for name in (stage.initial, one.reward))  # paths: themselves
            made = replace(made, run_id=tuned_identity(initial, shape, data, training, made, reward))
            identities[stage.name] = made.run_id
            chosen[kind].append(made)
    for kind, found in chosen.items():
        if not found:
            ledger.note(kind, None, "derived", f"the spec has no stage of kind {kind}")
    return Tunings(
        sft=tuple(made for made in chosen["sft"] if isinstance(made, Sft)),
        reward=tuple(made for made in chosen["reward"] if isinstance(made, Reward)),
        dpo=tuple(made for made in chosen["dpo"] if isinstance(made, Dpo)),
        ppo=tuple(made for made in chosen["ppo"] if isinstance(made, Ppo)),
        grpo=tuple(made for made in chosen["grpo"] if isinstance(made, Grpo)),
    )


def _choose_tuning(section: Section, before: Pretrained, given: ResolvedTuning) -> Tuned:
    note, stage, kind, run_id = section.note, given.stage.name, given.stage.kind, ""
    note("stage", None, "pinned", "written under stages in the spec")
    note("run_id", None, "derived", "hash of the model that it starts from, its data as written, and its settings")
    inner = replace(section, leaf=f"{section.leaf}.training")
    one = Batching(inner, given, find_recipe(kind), before.training, before.layout)
    path = note("path", given.path, "derived", "a connector makes the records", key="data")
    if kind in ("ppo", "grpo"):
        return _choose_reinforced(section, before, one, path)
    numbers = one.recipe.numbers
    connector = note("connector", given.connector, "derived", "read from a path")
    too_long = note(
        "too_long", given.too_long.pick("truncate"), "default", "the beginning is kept, and nothing dropped"
    )
    batch = choose_rows(one)
    training = _choose_schedule(before, one, batch, choose_micro_batch(one, batch, "global_batch"))
    volume = choose_volume(one, section)
    if kind == "reward":
        return Reward(stage, run_id, path, connector, too_long, training, volume)
    if kind == "dpo":
        beta, nll = numbers["beta"], numbers["nll"]
        return Dpo(
            *(stage, run_id, path, connector, too_long),
            beta=note("beta", given.beta.clip(beta.value), "default", beta.source),
            nll=note("nll", given.nll.clip(nll.value), "default", nll.source),
            training=training,
            volume=volume,
        )
    template = note("chat_template", given.chat_template, "default", "that of the model, else ChatML")
    return Sft(stage, run_id, path, connector, too_long, template, training, volume)


def _choose_reinforced(section: Section, before: Pretrained, one: Batching, path: str) -> Ppo | Grpo:
    note, given, numbers, kind = section.note, one.given, one.recipe.numbers, one.kind
    samples = choose_samples(one)
    batch = choose_rows(one, samples)
    minibatch = choose_minibatch(one, batch)
    context = before.training.context_length
    longest = numbers["max_answer_tokens"]
    max_answer = int(given.max_answer_tokens.clip(min(longest.value, max(1, context // 2))))
    if max_answer >= context:
        raise one.refuse(
            "max_answer_tokens", f"{max_answer:,} tokens leave a context of {context:,} no room for a prompt; lower it"
        )
    kl = suggest_for_size(one.recipe.by_size["kl"], count_parameters(before.shape, context))
    verified = "nothing names a reward model: a program checks the answers"
    text = verified if given.reward == VERIFIER else "the nearest above it that scores answers"
    whole = f"{numbers['minibatch'].source}; the largest divisor of the {batch} episodes a step with at most as many, whole on"
    answers = f"global_batch {batch} / samples {samples}"
    value_why = "ppo learns the value of each token" if kind == "ppo" else "the mean of a prompt's samples is its value"
    make = Ppo if kind == "ppo" else Grpo
    return make(
        stage=given.stage.name,
        run_id="",
        path=path,
        reward=note("reward", given.reward, "derived", text),
        prompts=note("prompts", batch // samples, "derived", f"{answers}; {numbers['samples'].source}", key="samples"),
        minibatch=note("minibatch", minibatch, "default", f"{whole} each of data {before.layout.data}"),
        inner_epochs=note(
            "inner_epochs",
            int(given.inner_epochs.clip(numbers["inner_epochs"].value)),
            "default",
            numbers["inner_epochs"].source,
        ),
        max_answer_tokens=note(
            "max_answer_tokens",
            max_answer,
            "default",
            f"{longest.source}; at most half of a context of {context:,} tokens",
        ),
        temperature=note(
            "temperature",
            given.temperature.clip(numbers["temperature"].value),
            "default",
            numbers["temperature"].source,
        ),
        kl=note("kl", given.kl.clip(kl.value), "default", kl.source),
        clip=note("clip", given.clip.clip(numbers["clip"].value), "default", numbers["clip"].source),
        training=_choose_schedule(before, one, batch, choose_micro_batch(one, minibatch, "minibatch")),
        volume=choose_volume(one, section, samples, max_answer),
        value_model=note("value_model", kind == "ppo", "derived", value_why),
    )


def _choose_schedule(before: Pretrained, one: Batching, batch: int, micro_batch: int) -> TuningSchedule:
    note, given, recipe, numbers = one.section.note, one.given, one.recipe, one.recipe.numbers
    parameters = count_parameters(before.shape, before.training.context_length)
    suggested = suggest_learning_rate(recipe, parameters, before.training.learning_rate)
    rate = note("learning_rate", given.learning_rate.clip(suggested.value), "default", suggested.source)
    schedule = note("schedule", given.schedule.pick(recipe.schedule), "default", recipe.schedule_source)
    share = numbers["min_rate_share"]
    end, why = (
        (rate, "a constant rate ends as it was") if schedule == "constant" else (share.value * rate, share.source)
    )
    return TuningSchedule(
        epochs=note("epochs", int(given.epochs.clip(numbers["epochs"].value)), "default", numbers["epochs"].source),
        global_batch=batch,
        micro_batch=micro_batch,
        learning_rate=rate,
        min_learning_rate=note("min_learning_rate", given.min_learning_rate.clip(end), "default", why),
        schedule=schedule,
        warmup=note("warmup", given.warmup.clip(numbers["warmup"].value), "default", numbers["warmup"].source),
        weight_decay=note(
            "weight_decay",
            given.weight_decay.clip(numbers["weight_decay"].value),
            "default",
            numbers["weight_decay"].source,
        ),
        checkpoint_every_steps=choose_cadence(one, batch, before.step_s),
    )
