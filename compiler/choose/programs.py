"""What each program of the bundle holds and executes, and what would help where one does not fit."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trainwright.compiler.choose.candidate import Candidate
from trainwright.compiler.choose.layout import split_layers
from trainwright.compiler.choose.tuning import Tunings
from trainwright.compiler.estimate.layouts import Workload, one_layout
from trainwright.compiler.estimate.memory import estimate_memory
from trainwright.compiler.estimate.programs import Rows, estimate_program
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.layout_rules import Terms, legal_rows
from trainwright.compiler.plan import Layout, ProgramEstimate, Remedy, round_leaf
from trainwright.compiler.plan_stages import StagePlan, TuningSchedule


def estimate_programs(
    workload: Workload, layout: Layout, stages: Sequence[StagePlan], tunings: Tunings
) -> tuple[ProgramEstimate, ...]:
    """Of every stage that is emitted and trains or asks the model, in executing order."""
    rows = {
        "pretrain": lambda name: Rows(layout.micro_batch, layout.micro_batches),
        "sft": lambda name: _tuned(layout, _schedule(tunings, name), sequences=1),
        "dpo": lambda name: _tuned(layout, _schedule(tunings, name), sequences=2),  # a pair
        # An interleaved schedule takes as many micro-batches as there are pipeline ranks.
        "evaluate": lambda name: Rows(
            layout.micro_batch, layout.pipeline if layout.virtual_pipeline > 1 else 1, trained=False
        ),
    }
    return tuple(
        ProgramEstimate(stage.name, stage.kind, estimate_program(workload, layout, rows[stage.kind](stage.name)))
        for stage in stages
        if stage.kind in rows
    )


def _schedule(tunings: Tunings, name: str) -> TuningSchedule:
    return next(tuned.training for tuned in tunings.all if tuned.stage == name)


def _tuned(layout: Layout, training: TuningSchedule, sequences: int) -> Rows:
    micro_batches = training.global_batch // (training.micro_batch * layout.data)
    return Rows(sequences * training.micro_batch, micro_batches)


def find_remedies(chosen: Candidate) -> tuple[Remedy, ...]:
    """Legal changes of the chosen layout that need less memory, one at a time, in the order to try them."""
    workload, layout = chosen.workload, chosen.layouts.ranked.row(0)
    terms = Terms(
        shape=workload.shape,
        context_length=workload.context_length,
        global_batch=chosen.training.global_batch,
        nodes=workload.nodes,
        devices_per_node=workload.devices_per_node,
    )
    now = float(estimate_memory(workload, one_layout(layout)).total[0])
    remedies = []
    for change, other in _changes(workload.shape.num_layers, chosen.training.global_batch, layout):
        row = one_layout(other)
        memory = float(estimate_memory(workload, row).total[0])
        if legal_rows(terms, row)[0] and memory < now:
            remedies.append(
                Remedy(change, round(memory), round_leaf(float(estimate_step_time(workload, row).total[0])))
            )
    return tuple(remedies)


def _changes(num_layers: int, global_batch: int, layout: Layout) -> Iterator[tuple[str, Layout]]:
    if layout.recompute != "full":
        whole: dict[str, Any] = {
            "recompute": "full",
            "recompute_modules": (),
            "recompute_method": "uniform",
            "recompute_layers": 1,
        }
        yield "recompute: full", replace(layout, **whole)
    pipeline, data = 2 * layout.pipeline, layout.data // 2
    if data and layout.data % 2 == 0:
        table = one_layout(replace(layout, pipeline=pipeline))
        split = split_layers(num_layers, table.pipeline, table.virtual_pipeline)
        yield (
            f"pipeline: {pipeline}",
            replace(
                layout,
                pipeline=pipeline,
                data=data,
                micro_batches=global_batch // (layout.micro_batch * data),
                **{name: column[0].item() for name, column in split.items()},
            ),
        )
    if layout.micro_batch % 2 == 0:
        half = layout.micro_batch // 2
        yield (
            f"micro_batch: {half}",
            replace(layout, micro_batch=half, micro_batches=global_batch // (half * layout.data)),
        )
