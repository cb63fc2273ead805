"""Which stages a plan has and in which order: the written ones, and those that they need and nobody wrote."""

from collections.abc import Mapping
from itertools import chain

from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.plan_stages import StagePlan
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.resolve_stages import ResolvedEvaluation, ResolvedStage, ResolvedStages

# What each kind reads, by kind, in the order of the pipeline. Those that start from a model read what their `from` names.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "ingest": (),
    "curate": ("ingest",),
    "tokenizer": ("curate",),
    "tokenize": ("curate", "tokenizer"),
    "pretrain": ("ingest", "tokenize", "tokenizer"),
    "sft": (),
    "reward": (),
    "dpo": (),
    "ppo": (),
    "grpo": (),
    "evaluate": (),
    "export": (),
}


def choose_stages(spec: ResolvedSpec, ledger: Ledger) -> tuple[StagePlan, ...]:
    """The stage instances in executing order, with a reason for each of their leaves."""
    written = {stage.name: stage for stage in spec.stages.written}
    stages = order_stages(spec.stages)
    for index, stage in enumerate(stages):
        prefix, given = f"stages[{index}]", written.get(stage.name)
        text = "written under stages in the spec" if given else "nobody wrote it; a later stage needs it"
        for leaf in ("name", "kind", "implied"):
            ledger.note(f"{prefix}.{leaf}", None, "pinned" if given else "derived", text)
        why, through = _why_initial(given)
        ledger.note(
            f"{prefix}.initial", None, "derived", why + through, pin=f"stages.{stage.name}.from", detail=through
        )
        read = f"what a stage of kind {stage.kind} reads"
        for leaf in [f"needs[{n}]" for n in range(len(stage.needs))] or ["needs"]:
            ledger.note(f"{prefix}.{leaf}", None, "derived", read)
        ledger.note(
            f"{prefix}.retries",
            None,
            "default",
            "a stage that failed stops the run",
            pin=f"stages.{stage.name}.retries",
        )
    return stages


def _why_initial(stage: ResolvedStage | None) -> tuple[str, str]:
    """(why a stage starts where it does, how that leads to a model where it isn't one)."""
    if stage is None or not stage.origin:
        return "it starts from no model", ""
    through = f"; the model that {stage.origin} evaluates" if stage.origin != stage.initial else ""
    return f"{stage.origin} is the nearest above it that has a model", through


def order_stages(stages: ResolvedStages) -> tuple[StagePlan, ...]:
    """The instances in executing order.

    Kinds that these need are implied, one instance each, named like the kind. The order is the topological one with ties
    broken by the order of the pipeline, then by name: the same spec gives the same numbers.
    """
    import networkx  # 0.1 s: not for `--help`

    written = {stage.name: stage for stage in stages.written}
    texts = {evaluation.stage.name: evaluation for evaluation in stages.evaluations}
    scorers = {tuning.stage.name: tuning.reward for tuning in stages.tunings}
    kinds = {stage.name: stage.kind for stage in stages.written}
    implied: set[str] = set()
    pending = list(kinds)
    while pending:
        name = pending.pop()
        for needed in _kinds_read(kinds[name], texts.get(name)):
            if needed not in kinds.values():
                kinds[needed] = needed
                implied.add(needed)
                pending.append(needed)
    needs = {
        name: (
            *_models_read(written.get(name), texts.get(name), scorers.get(name, ""), kinds),
            # Of a kind that others read, a spec has one instance.
            *(next(other for other in kinds if kinds[other] == read) for read in _kinds_read(kind, texts.get(name))),
        )
        for name, kind in kinds.items()
    }
    graph = networkx.DiGraph()
    graph.add_nodes_from(kinds)
    graph.add_edges_from(chain.from_iterable(((source, name) for source in sources) for name, sources in needs.items()))
    rank = list(NEEDS)
    order = networkx.lexicographical_topological_sort(graph, key=lambda name: (rank.index(kinds[name]), name))
    return tuple(
        StagePlan(
            name=name,
            kind=kinds[name],
            implied=name in implied,
            initial=written[name].initial if name in written else "",
            needs=needs[name],
            retries=int(written[name].retries.clip(0)) if name in written else 0,
        )
        for name in order
    )


def _kinds_read(kind: str, evaluation: ResolvedEvaluation | None) -> tuple[str, ...]:
    return (*NEEDS[kind], *(("tokenize",) if evaluation is not None and evaluation.text else ()))


def _models_read(
    stage: ResolvedStage | None, evaluation: ResolvedEvaluation | None, scorer: str, kinds: Mapping[str, str]
) -> tuple[str, ...]:
    """The model that a stage starts from, the evaluation whose gates stand between, the models that it is compared with, and the
    one that scores its answers; of these the instances, not the paths."""
    if stage is None:
        return ()
    named = (stage.initial, stage.origin, *(evaluation.compare if evaluation is not None else ()), scorer)
    return tuple(dict.fromkeys(name for name in named if name in kinds))
