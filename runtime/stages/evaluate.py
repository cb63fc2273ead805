"""Measure a model on held-out data, beside the models it came from, and hold its figures against gates.

Leaves `work/<stage>/output/`: `results.json` (all figures), `items.jsonl` (each item's score by each model) and, where every
gate was passed, `summary.json`. Rank 0 asks and counts, all ranks answer. Killed, it starts again, to the same figures.
"""

import shutil
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from trainwright.runtime.errors import GateFailed, RunError
from trainwright.runtime.megatron.job import Job, MicroBatch, declare
from trainwright.runtime.megatron.model import Embedding, Model, build_frozen
from trainwright.runtime.megatron.parallel import Parallel, check_model, start
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.crew import Crew, follow
from trainwright.runtime.stages.gates import Gate, check_gates
from trainwright.runtime.stages.measures import Values
from trainwright.runtime.stages.preparation import Perplexity, Preparation, Records, Task
from trainwright.runtime.stages.results import Results, conclude, item_lines
from trainwright.runtime.workspace import Progress, StageFolder, Workspace, open_workspace, write_atomically, write_json

__all__ = ["Embedding", "Gate", "Parallel", "Perplexity", "Records", "Task", "run"]

RESULTS_FILE, ITEMS_FILE = "results.json", "items.jsonl"

install()  # before the program builds its configs


@stage_verb
def run(
    *,
    stage: str,
    seed: int,
    initial: str,
    compare: Sequence[str],
    parallel: Parallel,
    model: Any,
    embedding: Embedding,
    layer_spec: str,
    micro_batch: int,
    perplexity: Perplexity | None,
    conversations: Sequence[Records],
    preferences: Sequence[Records],
    tasks: Sequence[Task],
    gates: Sequence[Gate],
) -> None:
    """Measure the newest checkpoint of `initial` and of each of `compare` (stages, or paths). `model` is Megatron-Core's config;
    a row of the forward pass has `micro_batch` contexts.

    Raises DataError (records, tasks, gates), CheckpointError (none there, or another model's), Unsupported, and, when all
    figures are written, GateFailed.
    """
    length = embedding.sequence_length
    job = declare(
        Job(
            parallel=parallel,
            seed=seed,
            literals=Literals(model, None, None, layer_spec),
            embedding=embedding,
            micro_batch=MicroBatch(1, micro_batch * length, segments=micro_batch),
            micro_batches=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
            loss=None,
        )
    )
    workspace = open_workspace()
    folder = workspace.stage(stage)
    check_model(parallel, model, sequence_length=length, padded_vocab_size=embedding.padded_vocab_size)
    platform = start(parallel, seed)
    literals, overrides = platform.adapt(job.literals)
    problem: list[RunError | None] = [None]
    preparation = None
    if dist.get_rank() == 0:
        print(platform.describe(overrides), flush=True)
        shutil.rmtree(folder.output, ignore_errors=True)
        try:
            preparation = Preparation(workspace, folder, (initial, *compare), length, seed)
            preparation.read(perplexity, conversations, preferences, tasks)
            check_gates(gates, preparation.metrics)
        except RunError as error:
            problem[0] = error
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise problem[0]
    built = build_frozen(literals, embedding, platform)
    results = None
    if preparation is None:
        follow(built, micro_batch * length)
    else:
        results = _measure(folder, preparation, built, micro_batch * length, gates, seed)
    dist.barrier()
    dist.destroy_process_group()
    if results:
        _judge(results, folder, workspace)


def _measure(
    folder: StageFolder, preparation: Preparation, built: Model, row_tokens: int, gates: Sequence[Gate], seed: int
) -> Results:
    """Ask every model, one after the other; write every figure. On rank 0, while the others follow."""
    measures = preparation.measures
    progress = Progress(
        folder, len(preparation.models) * sum(one.num_sequences for one in measures.values()), "sequences"
    )
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    crew = Crew(built, row_tokens, tick)
    values: dict[str, Values] = {}
    for name, checkpoint in preparation.models.items():
        crew.load(checkpoint)
        print(f"{name}: {checkpoint.name}", flush=True)
        values[name] = {metric: those for one in measures.values() for metric, those in one.values(crew.ask).items()}
    crew.dismiss()
    results = conclude(preparation.metrics, values, preparation.baselines(), gates, seed)
    print(results.table(), flush=True)
    about = {
        "checkpoints": {name: checkpoint.name for name, checkpoint in preparation.models.items()},
        "counts": {name: dict(one.counts) for name, one in measures.items()},
    }
    write_atomically(folder.output / ITEMS_FILE, item_lines(preparation.metrics, values))
    write_json(folder.output / RESULTS_FILE, results.document(about))
    return results


def _judge(results: Results, folder: StageFolder, workspace: Workspace) -> None:
    """Declare the stage complete. Raises GateFailed where a gate was missed."""
    if results.failures:
        path = folder.output / RESULTS_FILE
        shown = path.relative_to(workspace.bundle) if path.is_relative_to(workspace.bundle) else path
        missed = "; ".join(f"gate {verdict}" for verdict in results.failures)
        raise GateFailed(f"{missed}; {shown} has all figures")
    write_json(folder.summary, {"model": results.models[0], "key_figure": results.key_figure()})
