"""A stage's entry in the manifest: how its program is started, what it reads, what it needs."""

from trainwright.compiler.plan import Plan, Source
from trainwright.compiler.plan_stages import Dpo, Evaluate, Export, Records, Sft, StagePlan, Task
from trainwright.runtime.manifest import Stage, program_identity

LAUNCHER_OF_KIND = {
    "ingest": "python",
    "curate": "python",
    "tokenizer": "python",
    "tokenize": "python",
    "pretrain": "torchrun",
    "sft": "torchrun",
    "dpo": "torchrun",
    "evaluate": "torchrun",
    "export": "python",
}
_MEGATRON = ("torch", "megatron")
# Top-level packages that a program imports and that the base installation lacks.
_PACKAGES_OF_KIND: dict[str, tuple[str, ...]] = {
    "curate": ("datatrove", "rensa"),
    "tokenizer": ("tokenizers",),
    "tokenize": (*_MEGATRON, "tokenizers"),
    "pretrain": (*_MEGATRON, "tokenizers"),
    "sft": (*_MEGATRON, "nemo", "transformers"),
    "dpo": (*_MEGATRON, "nemo", "transformers"),
    "evaluate": (*_MEGATRON, "transformers", "lm_eval"),
    "export": (*_MEGATRON, "transformers"),
}


def settings_of(plan: Plan, stage: StagePlan) -> Sft | Dpo | Evaluate | Export | None:
    """The settings that a stage has of its own."""
    entries: tuple[Sft | Dpo | Evaluate | Export, ...] = (*plan.sft, *plan.dpo, *plan.evaluate, *plan.export)
    return next((entry for entry in entries if entry.stage == stage.name), None)


def stage_entry(plan: Plan, stage: StagePlan, program: str, source: str) -> Stage:
    """What the runner needs to know of a stage whose program is the file `program` with the text `source`."""
    launcher = LAUNCHER_OF_KIND[stage.kind]
    parallel = launcher == "torchrun"
    return Stage(
        name=stage.name,
        kind=stage.kind,
        program=program,
        program_id=program_identity(source),
        launcher=launcher,
        nodes=plan.cluster.nodes if parallel else 1,
        processes_per_node=plan.cluster.devices_per_node if parallel else 1,
        needs=stage.needs,
        inputs=_inputs(plan, stage),
        outputs=("output",),
        implied=stage.implied,
        retries=stage.retries,
        packages=_PACKAGES_OF_KIND.get(stage.kind, ()),
    )


def _inputs(plan: Plan, stage: StagePlan) -> tuple[str, ...]:
    """What of the user's a stage reads: globs as written, connectors, and the checkpoints that are named by a path."""
    given = settings_of(plan, stage)
    reads: list[Source | Sft | Dpo | Records | Task] = []
    models, files = [stage.initial], []
    if stage.kind in ("tokenizer", "pretrain"):
        models.append(plan.training.initial)
    if stage.kind == "ingest":
        reads += plan.data.sources
    if isinstance(given, Sft | Dpo):
        reads.append(given)
    if isinstance(given, Sft):
        files.append(given.chat_template)
    if isinstance(given, Evaluate):
        reads += [*given.conversations, *given.preferences, *given.tasks]
        models += given.compare
    names = {other.name for other in plan.stages}
    found = [f"connector:{read.connector}" if read.connector else read.path for read in reads]
    paths = [model for model in models if model not in names]
    return tuple(dict.fromkeys(path for path in (*found, *files, *paths) if path))
