"""What the stages of kind evaluate measure, and what those of kind export require."""

from trainwright.compiler.choose.ledger import Ledger, Section
from trainwright.compiler.plan_stages import Dpo, Evaluate, Export, Gate, Records, Sft, StagePlan, Task
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.resolve_stages import ResolvedEvaluation, ResolvedTask

TOLERANCE = 1e-4  # logits of the exported model against Megatron-Core's, in fp32


def choose_evaluations(
    spec: ResolvedSpec, ledger: Ledger, stages: tuple[StagePlan, ...], tuned: tuple[Sft | Dpo, ...]
) -> tuple[Evaluate, ...]:
    """The stages of kind evaluate, in executing order."""
    given = {evaluation.stage.name: evaluation for evaluation in spec.stages.evaluations}
    names = [stage.name for stage in stages if stage.name in given]
    if not names:
        ledger.note("evaluate", None, "derived", "the spec has no stage of kind evaluate")
    return tuple(
        _choose(Section(ledger, f"evaluate[{index}]", f"stages.{name}"), given[name], tuned)
        for index, name in enumerate(names)
    )


def _choose(section: Section, given: ResolvedEvaluation, tuned: tuple[Sft | Dpo, ...]) -> Evaluate:
    note = section.note
    for index in range(len(given.compare)):
        note(f"compare[{index}]", None, "pinned", "")
    for part in ("compare", "tasks", "gates"):
        if not getattr(given, part):
            note(part, None, "default", "none is asked for")
    text = "its model comes from this bundle, whose held-out text is there"
    return Evaluate(
        stage=note("stage", given.stage.name, "pinned", "written under stages in the spec"),
        compare=given.compare,
        text=note(
            "text", given.text, "derived", text if given.text else "its model comes from a path: no text is held out"
        ),
        conversations=_records(section, "conversations", given.conversations, tuned),
        preferences=_records(section, "preferences", given.preferences, tuned),
        tasks=tuple(_task(section, index, task) for index, task in enumerate(given.tasks)),
        gates=tuple(_gate(section, index, metric, value) for index, (metric, value) in enumerate(given.gates)),
    )


def _records(section: Section, part: str, names: tuple[str, ...], tuned: tuple[Sft | Dpo, ...]) -> tuple[Records, ...]:
    """The held-out records of these tuning stages."""
    if not names:
        section.note(part, None, "derived", "no model here was tuned on such records in this bundle")
    by_name = {stage.stage: stage for stage in tuned}
    for index, name in enumerate(names):
        for leaf in ("name", "path", "connector", "too_long"):
            section.note(
                f"{part}[{index}].{leaf}", None, "derived", f"as {name} reads them: a model here was tuned on them"
            )
    return tuple(Records(name, by_name[name].path, by_name[name].connector, by_name[name].too_long) for name in names)


def _task(section: Section, index: int, given: ResolvedTask) -> Task:
    below = Section(section.ledger, f"{section.leaf}.tasks[{index}]", f"{section.pin}.tasks.{given.name}")
    return Task(
        name=below.note("name", given.name, "pinned", f"written under {section.pin}.tasks in the spec"),
        path=below.note("path", given.path, "derived", "a connector makes the questions", key="data"),
        connector=below.note("connector", given.connector, "derived", "read from a path"),
        num_fewshot=below.note(
            "num_fewshot", int(given.num_fewshot.clip(0)), "default", "the questions explain themselves"
        ),
    )


def _gate(section: Section, index: int, metric: str, threshold: float) -> Gate:
    leaf, pin = f"{section.leaf}.gates[{index}]", f"{section.pin}.gates.{metric}"
    return Gate(
        metric=section.ledger.note(f"{leaf}.metric", metric, "pinned", "", pin=pin),
        threshold=section.ledger.note(f"{leaf}.threshold", threshold, "pinned", "", pin=pin),
    )


def choose_exports(ledger: Ledger, stages: tuple[StagePlan, ...]) -> tuple[Export, ...]:
    """The stages of kind export, in executing order."""
    names = [stage.name for stage in stages if stage.kind == "export"]
    if not names:
        ledger.note("export", None, "derived", "the spec has no stage of kind export")
    text = "differences in the order of sums stay well below it in fp32, and a wrong mapping of weights far above"
    return tuple(
        Export(
            stage=ledger.note(f"export[{index}].stage", name, "pinned", "written under stages in the spec"),
            tolerance=ledger.note(f"export[{index}].tolerance", TOLERANCE, "default", text),
        )
        for index, name in enumerate(names)
    )
