"""Which stages a plan has and in which order: the written ones, and those that they need and nobody wrote."""

from collections.abc import Sequence
from itertools import chain

from trainwright.compiler.errors import SpecError
from trainwright.compiler.plan import StagePlan

# What each kind reads, by kind, in the order of the pipeline.
NEEDS: dict[str, tuple[str, ...]] = {
    "ingest": (),
    "tokenizer": ("ingest",),
    "tokenize": ("ingest", "tokenizer"),
    "pretrain": ("tokenize", "tokenizer"),
}


def choose_stages(written: Sequence[tuple[str, str]]) -> tuple[StagePlan, ...]:
    """The stage instances in executing order, from the written (name, kind) pairs.

    Kinds that these need are implied, one instance each, named like the kind. The order is the topological one with ties
    broken by the order of the pipeline, then by name: the same spec gives the same numbers. Raises SpecError when two
    written stages could serve one need.
    """
    import networkx  # 0.1 s: not for `--help`

    instances = dict(written)
    implied: set[str] = set()
    pending = [kind for _, kind in written]
    while pending:
        for needed in NEEDS[pending.pop()]:
            if needed not in instances.values():
                instances[needed] = needed
                implied.add(needed)
                pending.append(needed)
    graph = networkx.DiGraph()
    needs = {
        name: tuple(_provider(needed, name, instances) for needed in NEEDS[kind]) for name, kind in instances.items()
    }
    graph.add_nodes_from(instances)
    graph.add_edges_from(chain.from_iterable(((source, name) for source in sources) for name, sources in needs.items()))
    rank = list(NEEDS)
    order = networkx.lexicographical_topological_sort(graph, key=lambda name: (rank.index(instances[name]), name))
    return tuple(
        StagePlan(name=name, kind=instances[name], implied=name in implied, needs=needs[name]) for name in order
    )


def _provider(kind: str, wanted_by: str, instances: dict[str, str]) -> str:
    names = [name for name, other in instances.items() if other == kind]
    if len(names) > 1:
        raise SpecError(
            f"stages.{wanted_by}: needs one stage of kind {kind}, and {' and '.join(names)} are two; keep one"
        )
    return names[0]
