"""The stages of a spec with every reference followed and every open question a set or a range."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainwright.compiler.lineage import base_of, is_path, kind_of, model_of, origin_of, reward_of, tuned_on_the_way
from trainwright.compiler.ranges import Choice, Range, open_choice, open_range
from trainwright.compiler.spec import Spec
from trainwright.compiler.spec_stages import TUNING_KINDS, StageSpec


@dataclass(frozen=True)
class ResolvedStage:
    """One written instance."""

    name: str
    kind: str
    origin: str  # the instance or path that it starts from; "" for a kind that starts from none
    initial: str  # the model stage or path that this stands for; "" likewise
    retries: Range


@dataclass(frozen=True)
class ResolvedCuration:
    near_duplicates: Range
    scrub: tuple[tuple[str, ...], ...]  # one when pinned, else empty


@dataclass(frozen=True)
class ResolvedTuning:
    """A stage of a kind that tunes; what only other kinds have is open."""

    stage: ResolvedStage
    path: str  # "" with a connector
    connector: str  # "" with a path
    too_long: Choice[str]
    chat_template: str  # "": that of the model, else the default
    epochs: Range
    global_batch_unit: str  # "tokens" | "sequences"
    global_batch: Range  # in that unit
    learning_rate: Range
    min_learning_rate: Range
    schedule: Choice[str]
    warmup: Range  # fraction of the steps
    weight_decay: Range
    beta: Range
    nll: Range
    reward: str  # of ppo and grpo: an instance, a path, or "verifier"; else ""
    samples: Range
    kl: Range
    clip: Range
    minibatch: Range  # episodes
    inner_epochs: Range
    temperature: Range
    max_answer_tokens: Range
    examples: Range
    prompt_tokens: Range
    answer_tokens: Range


@dataclass(frozen=True)
class ResolvedTask:
    name: str
    path: str  # "" with a connector
    connector: str  # "" with a path
    num_fewshot: Range


@dataclass(frozen=True)
class ResolvedEvaluation:
    """A stage of kind evaluate."""

    stage: ResolvedStage
    compare: tuple[str, ...]
    text: bool  # the model was pretrained in this bundle, which has the held-out text
    conversations: tuple[str, ...]  # stages of kind sft whose held-out records are measured
    preferences: tuple[str, ...]  # stages of kind dpo, likewise
    tasks: tuple[ResolvedTask, ...]
    gates: tuple[tuple[str, float], ...]  # (metric, threshold)


@dataclass(frozen=True)
class ResolvedStages:
    written: tuple[ResolvedStage, ...]  # in the order of the spec, as the rest
    curation: ResolvedCuration
    baseline: Choice[str]  # "bigram" | "none"
    tunings: tuple[ResolvedTuning, ...]
    evaluations: tuple[ResolvedEvaluation, ...]

    def paths(self) -> Iterator[tuple[str, str]]:
        """(place in the spec, path or glob) of what of the user's the stages read; "" where it is something else."""
        for stage in self.written:
            yield f"stages.{stage.name}.from", stage.origin if is_path(stage.origin) else ""
        for tuning in self.tunings:
            yield f"stages.{tuning.stage.name}.data", tuning.path
            yield f"stages.{tuning.stage.name}.chat_template", tuning.chat_template
            yield f"stages.{tuning.stage.name}.reward", tuning.reward if is_path(tuning.reward) else ""
        for evaluation in self.evaluations:
            for task in evaluation.tasks:
                yield f"stages.{evaluation.stage.name}.tasks.{task.name}.data", task.path


def resolve_stages(spec: Spec) -> ResolvedStages:
    """The stages of a spec without contradictions."""
    stages = spec.stages
    written = {name: _stage(spec, name) for name in stages}
    curate = next((stage for name, stage in stages.items() if kind_of(stages, name) == "curate"), StageSpec())
    baseline = next((stage.baseline for stage in stages.values() if stage.baseline), None)
    return ResolvedStages(
        written=tuple(written.values()),
        curation=ResolvedCuration(
            near_duplicates=open_range(curate.near_duplicates, "fraction"),
            scrub=() if curate.scrub is None else (curate.scrub,),
        ),
        baseline=open_choice(baseline, ("none", "bigram")),
        tunings=tuple(_tuning(spec, s) for s in written.values() if s.kind in TUNING_KINDS),
        evaluations=tuple(_evaluation(spec, s) for s in written.values() if s.kind == "evaluate"),
    )


def _stage(spec: Spec, name: str) -> ResolvedStage:
    origin = origin_of(spec.stages, name)
    return ResolvedStage(
        name=name,
        kind=kind_of(spec.stages, name),
        origin=origin,
        initial=model_of(spec.stages, origin),
        retries=open_range(spec.stages[name].retries, "retries"),
    )


def _tuning(spec: Spec, stage: ResolvedStage) -> ResolvedTuning:
    given = spec.stages[stage.name]
    batch = given.global_batch
    return ResolvedTuning(
        stage=stage,
        path=given.data or "",
        connector=given.connector or "",
        too_long=open_choice(given.too_long, ("truncate", "drop")),
        chat_template=given.chat_template or "",
        epochs=open_range(given.epochs, "epochs"),
        global_batch_unit=batch.kind if batch is not None else "sequences",
        global_batch=open_range(batch, "batch"),
        learning_rate=open_range(given.learning_rate, "learning_rate"),
        min_learning_rate=open_range(given.min_learning_rate, "min_learning_rate"),
        schedule=open_choice(given.schedule, ("cosine", "constant")),
        warmup=open_range(given.warmup, "fraction"),
        weight_decay=open_range(given.weight_decay, "not_negative"),
        beta=open_range(given.beta, "positive"),
        nll=open_range(given.nll, "not_negative"),
        reward=reward_of(spec.stages, stage.name),
        samples=open_range(given.samples, "samples"),
        kl=open_range(given.kl, "not_negative"),
        clip=open_range(given.clip, "positive"),
        minibatch=open_range(given.minibatch, "batch"),
        inner_epochs=open_range(given.inner_epochs, "epochs"),
        temperature=open_range(given.temperature, "positive"),
        max_answer_tokens=open_range(given.max_answer_tokens, "length"),
        examples=open_range(given.examples, "examples"),
        prompt_tokens=open_range(given.prompt_tokens, "length"),
        answer_tokens=open_range(given.answer_tokens, "length"),
    )


def _evaluation(spec: Spec, stage: ResolvedStage) -> ResolvedEvaluation:
    stages, given = spec.stages, spec.stages[stage.name]
    models = (stage.name, *(given.compare or ()))
    return ResolvedEvaluation(
        stage=stage,
        compare=given.compare or (),
        text=base_of(stages, stage.name) in stages,
        conversations=tuned_on_the_way(stages, models, "sft"),
        preferences=tuned_on_the_way(stages, models, "dpo"),
        tasks=tuple(
            ResolvedTask(
                name=name,
                path=task.data or "",
                connector=task.connector or "",
                num_fewshot=open_range(task.num_fewshot, "num_fewshot"),
            )
            for name, task in (given.tasks or {}).items()
        ),
        gates=tuple((given.gates or {}).items()),
    )
