"""What stage instances of a spec say in two ways, or about what is not there: kinds, fields, `from`, records, gates."""

import difflib
from collections.abc import Iterable, Iterator

from trainwright.compiler.lineage import (
    Stages,
    base_of,
    is_path,
    kind_of,
    lineage_of,
    model_of,
    origin_of,
    reward_of,
    stands_on,
    tuned_on_the_way,
)
from trainwright.compiler.metrics import list_metrics, range_of
from trainwright.compiler.spec import Spec
from trainwright.compiler.spec_stages import (
    MODEL_KINDS,
    PROMPT_KINDS,
    RECORD_KINDS,
    SINGLE_KINDS,
    STAGE_KINDS,
    STARTING_KINDS,
    TUNING_KINDS,
    VERIFIER,
    StageSpec,
    TaskSpec,
    key_of,
    kinds_with,
)
from trainwright.compiler.units import join_words

Found = Iterator[tuple[str, str]]  # (path, what is wrong and the fix)
_CONNECTOR_OF = {
    "sft": "python-stdlib:questions",
    "reward": "python-stdlib:preferences",
    "dpo": "python-stdlib:preferences",
}
_RECORDS, _YAML = (".jsonl", ".jsonl.gz", ".json", ".json.gz"), (".yaml", ".yml")  # what names of files end in
_TOO_LONG_OF = {"sft": ("truncate", "drop", "split"), "reward": ("truncate", "drop"), "dpo": ("truncate", "drop")}


def find_stage_contradictions(spec: Spec) -> Found:
    """Every stage instance that does not go together with itself or with the others."""
    stages = spec.stages
    yield from _kinds(stages)
    if any(kind_of(stages, name) not in STAGE_KINDS for name in stages):
        return  # what the other rules would say of such a stage is wrong
    for name, stage in stages.items():
        kind = kind_of(stages, name)
        yield from _foreign_fields(name, kind, stage)
        if kind in STARTING_KINDS:
            yield from _origin(stages, name)
        if kind in RECORD_KINDS:
            yield from _records(name, kind, stage)
        if kind in PROMPT_KINDS:
            yield from _prompts(name, kind, stage)
            yield from _reward(stages, name)
        if kind in TUNING_KINDS:
            yield from _rates(name, stage)
        if kind == "evaluate":
            yield from _compare(stages, name)
            for task, given in (stage.tasks or {}).items():
                yield from _one_of_two(f"stages.{name}.tasks.{task}", f"a task ({task})", given)
                yield from _readable(f"stages.{name}.tasks.{task}", given.data, (*_RECORDS, *_YAML))
            yield from _gates(spec, name)
    yield from _one_of_each(stages)


def _kinds(stages: Stages) -> Found:
    for name in stages:
        kind = kind_of(stages, name)
        if kind not in STAGE_KINDS:
            kinds = ", ".join(STAGE_KINDS)
            fix = f"add kind: with one of {kinds}, or rename the instance"
            yield f"stages.{name}", f"there is no stage kind {name}{_meant(name, STAGE_KINDS)}; {fix}"
        elif name == VERIFIER:
            yield f"stages.{name}", f"{name} is what `reward` calls a program that checks answers; rename the instance"
        elif name in STAGE_KINDS and kind != name:
            yield f"stages.{name}", f"{name} is the name of another kind than {kind}; rename the instance"


def _foreign_fields(name: str, kind: str, stage: StageSpec) -> Found:
    for field in StageSpec.model_fields:
        kinds = kinds_with(field)
        if getattr(stage, field) is not None and kind not in kinds:
            key = key_of(field)
            have = f"only a stage of kind {join_words(kinds)} has {key}"
            yield f"stages.{name}.{key}", f"{have}, and {name} is of kind {kind}; remove it"


def _origin(stages: Stages, name: str) -> Found:
    """`from` leads to a model, and not back to where it began."""
    path, origin = f"stages.{name}.from", origin_of(stages, name)
    models = [other for other in stages if other != name and _leads_to_model(stages, other)]
    known = f"take {join_words(models)}, or" if models else "add pretrain: {}, or"
    fix = f'{known} a path to a checkpoint, which holds a "/"'
    if not origin:
        yield path, f"there is no stage with a model above {name} to start from; {fix}"
    elif is_path(origin):
        return
    elif origin not in stages:
        yield path, f"there is no stage {origin}{_meant(origin, models)}; {fix}"
    elif not _leads_to_model(stages, origin):
        yield path, f"{_no_model(stages, origin)}; {fix}"
    elif origin_of(stages, (line := lineage_of(stages, name))[-1]) == name:
        circle = " from ".join((*line, name))
        yield path, f"{circle} is a circle; one of them must start from pretrain, or from a path to a checkpoint"


def _leads_to_model(stages: Stages, name: str) -> bool:
    return kind_of(stages, name) in (*MODEL_KINDS, "evaluate")


def _no_model(stages: Stages, name: str) -> str:
    kind = kind_of(stages, name)
    why = "scores answers, and is no language model" if kind == "reward" else "yields no model"
    return f"{name} is of kind {kind}, which {why}"


def _prompts(name: str, kind: str, stage: StageSpec) -> Found:
    """Prompts come from files, and a batch of episodes is whole prompts of whole samples."""
    path = f"stages.{name}"
    if stage.data is None:
        yield (
            path,
            f"there is no data: a stage of kind {kind} ({name}) generates answers to the prompts of its data; add it",
        )
    yield from _readable(path, stage.data, _RECORDS)
    samples, batch = stage.samples, stage.global_batch
    lone = "from which nothing is learned: grpo compares at least 2; take 8 or 16, or kind ppo"
    if kind == "grpo" and samples == 1:
        yield f"{path}.samples", f"1 answer is its own mean, {lone}"
    elif kind == "grpo" and batch is not None and (batch.kind, batch.count) == ("sequences", 1):
        yield f"{path}.global_batch", f"1 sequences hold the one answer of a prompt, {lone}"
    if batch is not None and batch.kind == "tokens":
        text = f"a batch of {kind} is counted in episodes, which are of any length; write it as sequences"
        yield f"{path}.global_batch", text
    elif batch is not None and samples is not None and batch.count % samples:
        near = sorted({max(1, batch.count // samples) * samples, -(-batch.count // samples) * samples})
        text = (
            f"{batch.count} sequences / samples {samples} = {batch.count / samples:.4g} prompts a step, and only whole ones"
            f" exist; take {join_words(map(str, near))}"
        )
        yield f"{path}.global_batch", text
    whole, part = batch.count if batch is not None else 0, stage.minibatch
    if part is not None and whole and (part > whole or whole % part):
        text = f"global_batch {whole} / minibatch {part} = {whole / part:.4g} updates, and only whole ones exist; take a divisor"
        yield f"{path}.minibatch", text


def _reward(stages: Stages, name: str) -> Found:
    """Answers are scored by a reward stage on the tokens of the policy, which is there before it; or by a verifier."""
    path, reward = f"stages.{name}.reward", reward_of(stages, name)
    scorers = [other for other in stages if kind_of(stages, other) == "reward" and not stands_on(stages, other, name)]
    known = f"take {join_words(scorers)}, or" if scorers else "add a stage of kind reward above it, or name"
    fix = (
        f'{known} a path to a checkpoint of one, which holds a "/", or {VERIFIER} where a program can check the answers'
    )
    if not reward:
        yield path, f"nothing scores the answers of {name}: there is no stage of kind reward above it; {fix}"
    elif reward == VERIFIER or is_path(reward):
        return
    elif reward not in stages:
        yield path, f"there is no stage {reward}{_meant(reward, scorers)}; {fix}"
    elif kind_of(stages, reward) != "reward":
        yield path, f"{reward} is of kind {kind_of(stages, reward)}, which scores no answers; {fix}"
    elif stands_on(stages, reward, name):
        yield path, f"{reward} comes from {name} itself, whose answers it is to score; {fix}"
    elif "" not in (bases := (base_of(stages, reward), base_of(stages, name))) and len(set(bases)) == 2:
        text = f"{reward} comes from {bases[0]}, and {name} from {bases[1]}: their tokens may differ"
        yield path, f"{text}; take a reward model that comes from {bases[1]}"


def _records(name: str, kind: str, stage: StageSpec) -> Found:
    path, connector = f"stages.{name}", stage.connector
    yield from _one_of_two(path, f"a stage of kind {kind} ({name})", stage)
    yield from _readable(path, stage.data, _RECORDS)
    if connector is not None and connector != _CONNECTOR_OF[kind]:
        others = " and ".join(other for other, made in _CONNECTOR_OF.items() if made == connector)
        text = f"{connector} makes records for {others}; for {kind} it is {_CONNECTOR_OF[kind]}"
        yield f"{path}.connector", text
    if stage.too_long is not None and stage.too_long not in _TOO_LONG_OF[kind]:
        text = f"a pair of answers cannot be split as a conversation can; take {join_words(_TOO_LONG_OF[kind])}"
        yield f"{path}.too_long", text


def _one_of_two(path: str, whose: str, given: StageSpec | TaskSpec) -> Found:
    if (given.data is None) == (given.connector is None):
        both = "data and connector are both there" if given.data else "neither data nor connector is there"
        yield path, f"{both}; {whose} has exactly one of them"


def _readable(path: str, data: str | None, endings: tuple[str, ...]) -> Found:
    """Files of another format by their names; a pattern whose ending is open may name any."""
    _, dot, ending = (data or "").rpartition("/")[2].rpartition(".")
    if dot and not set("*?[") & set(ending) and not (data or "").endswith(endings):
        yield f"{path}.data", f"{data} does not end in {join_words(endings)}; write it as JSON Lines, one object a line"


def _rates(name: str, stage: StageSpec) -> Found:
    low, high = stage.min_learning_rate, stage.learning_rate
    if low is not None and high is not None and low > high:
        yield f"stages.{name}.min_learning_rate", f"{low:g} is above learning_rate {high:g}; lower it"


def _compare(stages: Stages, name: str) -> Found:
    """Models of `compare` are others than the evaluated one, and answer the same items in the same tokens."""
    evaluated, base = model_of(stages, name), base_of(stages, name)
    compared = stages[name].compare or ()
    models = [other for other in stages if kind_of(stages, other) in MODEL_KINDS and other != evaluated]
    take = f"take {join_words(models)}" if models else "remove it"
    for index, other in enumerate(compared):
        path = f"stages.{name}.compare[{index}]"
        if other in compared[:index]:
            yield path, f"{other} stands there twice; keep one"
        elif other == evaluated:
            yield path, f"{other} is the model that {name} evaluates; {take}"
        elif not is_path(other) and other not in stages:
            yield path, f"there is no stage {other}{_meant(other, models)}; {take}"
        elif not is_path(other) and kind_of(stages, other) not in MODEL_KINDS:
            yield path, f"{_no_model(stages, other)}; {take}"
        elif base and base_of(stages, other) not in ("", base):
            text = f"{other} comes from {base_of(stages, other)}, and {evaluated} from {base}"
            yield path, f"{text}: their tokens and their split may differ; compare models that come from {base}"


def _gates(spec: Spec, name: str) -> Found:
    stage = spec.stages[name]
    if not stage.gates or not base_of(spec.stages, name):
        return
    metrics = metrics_of(spec, name)
    for metric, threshold in stage.gates.items():
        path = f"stages.{name}.gates.{metric}"
        if metric not in metrics:
            known = ", ".join(metrics) or "nothing: it has no tasks, and no records or text of this bundle"
            yield path, f"{name} measures no {metric}{_meant(metric, metrics)}; it measures {known}"
            continue
        low, high = range_of(metric)
        if not low <= threshold <= high:
            yield path, f"{threshold:g} is out of range: {metric} is between {low:g} and {high:g}"


def metrics_of(spec: Spec, name: str) -> tuple[str, ...]:
    """What an evaluate stage measures: text where the model comes from this bundle, the records of the tuning stages that
    its models have passed, and its tasks."""
    stages = spec.stages
    models = (name, *(stages[name].compare or ()))
    in_bundle = base_of(stages, name) in stages
    return list_metrics(
        sources=[source.name for source in spec.data.sources] if in_bundle else (),
        conversations=tuned_on_the_way(stages, models, "sft"),
        preferences={dpo: stages[dpo].connector or "" for dpo in tuned_on_the_way(stages, models, "dpo")},
        tasks=tuple(stages[name].tasks or ()),
    )


def _one_of_each(stages: Stages) -> Found:
    """The kinds that make the pretrained model are once in a plan: others read "the" tokenizer, "the" corpus."""
    for kind in SINGLE_KINDS:
        names = [name for name in stages if kind_of(stages, name) == kind]
        if len(names) > 1:
            text = f"{' and '.join(names)} are both of kind {kind}, and a plan pretrains one model; keep one"
            yield f"stages.{names[1]}", text


def _meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
