"""The layout: enumerate candidates, drop illegal ones, estimate, drop what does not fit, rank, take the first.

Ties (step times within 1e-9) go to fewer tensor, pipeline and expert ranks, then less recompute, then the larger micro-batch, so
that the same spec gives the same layout on every machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.layouts import (
    DEGREES,
    FSDP,
    FULL,
    RECOMPUTE,
    RECOMPUTE_METHODS,
    SELECTIVE,
    Floats,
    Ints,
    Layouts,
    Workload,
    modules_code,
)
from trainwright.compiler.estimate.memory import Memory, estimate_memory
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.layout_rules import RULES, Terms, legal_rows, list_violations
from trainwright.compiler.plan import Layout, Reason
from trainwright.compiler.resolve_layout import ResolvedLayout, StageSplit

VOCABULARY_MULTIPLE = 128  # Megatron's make_vocab_size_divisible_by: whole tiles of a matrix product
TIE = 1e-9
NUM_ALTERNATIVES = 5
GIB = 2**30


@dataclass(frozen=True)
class LayoutChoice:
    """`ranked`: the best row first, then the best rows of the next NUM_ALTERNATIVES (tensor, pipeline, expert)."""

    ranked: Layouts
    step_s: float  # of the best
    candidates: int
    legal: int
    fitting: int
    reasons: Mapping[str, Reason]  # by plan path: "layout.tensor"; the caller replaces those that the user pinned


def choose_layout(
    workload: Workload, global_batch: int, open_layout: ResolvedLayout, batch_unit: int = 0
) -> LayoutChoice:
    """The fastest legal layout that fits. `global_batch` in sequences; `batch_unit`: of which every batch is a multiple where it
    grows.

    Raises InfeasibleError when nothing is legal or nothing fits: which limit, and by how much the nearest candidate misses it.
    """
    terms = Terms(
        shape=workload.shape,
        context_length=workload.context_length,
        global_batch=global_batch,
        batch_unit=batch_unit,
        nodes=workload.nodes,
        devices_per_node=workload.devices_per_node,
    )
    table = enumerate_layouts(terms, open_layout)
    legal = table.take(legal_rows(terms, table))
    if not len(legal):
        raise InfeasibleError(_explain_illegal(terms, table))
    memory = estimate_memory(workload, legal)
    fits = memory.total <= workload.device.memory_bytes
    if not fits.any():
        raise InfeasibleError(_explain_too_large(workload, legal, memory))
    fitting = legal.take(fits)
    step_s = estimate_step_time(workload, fitting).total
    order = _rank(fitting, step_s)
    best_of_kind = _distinct(fitting, order)[: 1 + NUM_ALTERNATIVES]
    ranked = fitting.take(best_of_kind)
    counts = f"of {len(table):,} candidates {len(legal):,} are legal, {len(fitting):,} fit"
    reasons = _reasons(ranked, step_s[best_of_kind], counts, terms)
    return LayoutChoice(ranked, float(step_s[order[0]]), len(table), len(legal), len(fitting), reasons)


def enumerate_layouts(terms: Terms, open_layout: ResolvedLayout) -> Layouts:
    """Every combination of the candidates, legal or not; what follows from them (micro-batches, sharding, padding) derived."""
    axes = (
        open_layout.tensor.values,
        open_layout.pipeline.values,
        open_layout.micro_batch.values,
        tuple(RECOMPUTE.index(mode) for mode in open_layout.recompute.values),
        open_layout.virtual_pipeline.values,
        open_layout.context.values,
        open_layout.expert.values,
        open_layout.expert_tensor.values,
    )
    grid = np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    tensor, pipeline, micro_batch, recompute, chunks, context, expert, expert_tensor = (
        column.ravel() for column in grid
    )
    ones = np.ones_like(tensor)
    left = np.maximum(terms.nodes * terms.devices_per_node // (tensor * pipeline * context), 1)
    data = ones * open_layout.data.values[0] if open_layout.data.pinned else left
    return Layouts(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=chunks,
        context=context,
        expert=expert,
        expert_tensor=expert_tensor,
        data=data,
        micro_batch=micro_batch,
        micro_batches=np.maximum(terms.global_batch // (micro_batch * data), 1),
        **split_layers(terms.shape.num_layers, pipeline, chunks, open_layout.split),
        sequence_parallel=ones * open_layout.sequence_parallel[0] > 0 if open_layout.sequence_parallel else tensor > 1,
        distributed_optimizer=ones * open_layout.distributed_optimizer > 0,
        fsdp=ones * FSDP.index(open_layout.fsdp),
        recompute=recompute,
        recompute_modules=np.where(recompute == SELECTIVE, modules_code(open_layout.recompute_modules), 0),
        recompute_method=np.where(recompute == FULL, RECOMPUTE_METHODS.index(open_layout.recompute_method), 0),
        recompute_layers=np.where(recompute == FULL, open_layout.recompute_layers, 0),
        padded_vocab_size=pad_vocabulary(terms.shape.vocab_size, tensor),
    )


def split_layers(num_layers: int, pipeline: Ints, chunks: Ints, stated: tuple[StageSplit, ...] = ()) -> dict[str, Any]:
    """How the layers are cut into stages: as stated; else evenly where they divide; else with the embedding and the loss, or the
    loss alone, as layers (405B: 126 + 2); else with fewer layers in the last stage, which has the output layer too."""
    ones = np.ones_like(pipeline)
    if stated:
        (split,) = stated
        return {
            name: ones * value if not isinstance(value, bool) else ones * value > 0
            for name, value in vars(split).items()
        }
    stages = pipeline * chunks
    uneven = (pipeline > 1) & (num_layers % stages > 0)
    both = uneven & ((num_layers + 2) % stages == 0)
    loss = uneven & ~both & ((num_layers + 1) % stages == 0)
    a_stage = -(-num_layers // pipeline)
    fewer = num_layers - (pipeline - 1) * a_stage
    last = np.where(uneven & ~both & ~loss & (chunks == 1) & (fewer > 0), fewer, 0)
    return {
        "first_stage_layers": 0 * ones,
        "last_stage_layers": last,
        "embedding_as_layer": both,
        "loss_as_layer": both | loss,
    }


def pad_vocabulary(vocab_size: int, tensor: Ints) -> Ints:
    """The next multiple of VOCABULARY_MULTIPLE and tensor: one size for every tensor degree of a node of 8."""
    multiple = np.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


def _rank(table: Layouts, step_s: Floats) -> Ints:
    """Row numbers, best first."""
    by_time = np.argsort(step_s, kind="stable")
    group = np.zeros(len(table), dtype=np.int64)
    first = step_s[by_time[0]]
    current = 0
    for row in by_time:
        if step_s[row] > first * (1 + TIE):
            first, current = step_s[row], current + 1
        group[row] = current
    ties = (-table.micro_batch, table.recompute, table.expert, table.pipeline, table.tensor, group)
    return np.lexsort(ties)


def _distinct(table: Layouts, order: Ints) -> Ints:
    """Of `order`, the first row of each (tensor, pipeline, expert)."""
    kinds = np.stack([table.tensor[order], table.pipeline[order], table.expert[order]])
    _, first = np.unique(kinds, axis=1, return_index=True)
    return order[np.sort(first)]


def describe_layout(layout: Layout) -> str:
    """A layout in words, for messages."""
    always = ("tensor", "pipeline", "data", "micro_batch")
    degrees = {name: getattr(layout, name) for name in (*DEGREES, "micro_batch")}
    stated = [f"{name} {n}" for name, n in degrees.items() if n > 1 or name in always]
    return f"{', '.join(stated)}, recompute {layout.recompute}"


def _explain_illegal(terms: Terms, table: Layouts) -> str:
    broken = np.zeros(len(table), dtype=np.int64)
    for rule in RULES:
        broken += ~rule.holds(terms, table)
    nearest = int(np.argmin(broken))
    violations = "\n  ".join(list_violations(terms, table, nearest))
    return (
        f"no legal layout among {len(table):,} candidates; the nearest ({describe_layout(table.row(nearest))}) breaks\n"
        f"  {violations}\n"
        "the fix: change the pins of `layout`, `training.global_batch`, or the number of devices"
    )


def _explain_too_large(workload: Workload, legal: Layouts, memory: Memory) -> str:
    nearest = int(np.argmin(memory.total))
    row = memory.row(nearest, workload.device.memory_bytes)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "overhead")
    detail = ", ".join(f"{name} {getattr(row, name) / GIB:.1f}" for name in parts)
    pipelines = ", ".join(str(degree) for degree in np.unique(legal.pipeline))
    return (
        f"no layout fits: the smallest of {len(legal):,} legal ones needs {row.total / GIB:.1f} GiB of "
        f"{row.capacity / GIB:.1f} GiB on a device ({(row.total - row.capacity) / GIB:.1f} GiB too much) at "
        f"{describe_layout(legal.row(nearest))} ({detail} GiB); legal pipeline degrees with num_layers "
        f"{workload.shape.num_layers} on {workload.devices:,} devices: {pipelines}; the fix: more devices, a device with more "
        "memory, a smaller model or context_length, or fewer pins of `layout`"
    )


def _reasons(ranked: Layouts, step_s: Floats, counts: str, terms: Terms) -> dict[str, Reason]:
    best = ranked.row(0)
    runner_up = ""
    if len(ranked) > 1:
        runner_up = f"; next: {describe_layout(ranked.row(1))} at {step_s[1]:.4g} s"
    found = Reason("search", f"fastest that fits, {step_s[0]:.4g} s a step: {counts}{runner_up}")
    searched = ("tensor", "pipeline", "expert", "micro_batch", "recompute")
    devices = terms.nodes * terms.devices_per_node
    degrees = best.tensor * best.pipeline * best.context
    derived = {
        "data": f"{devices} devices / (tensor {best.tensor} x pipeline {best.pipeline}"
        f"{f' x context {best.context}' if best.context > 1 else ''}) = {devices // degrees}",
        "micro_batches": f"global_batch {terms.global_batch} / (micro_batch {best.micro_batch} x data {best.data}) = "
        f"{best.micro_batches}",
        "sequence_parallel": f"on where tensor > 1: activations beside the products are split too; tensor is {best.tensor}",
        "distributed_optimizer": "in every layout: states are split over data, and one layout's checkpoint loads in another",
        "padded_vocab_size": f"vocab_size {terms.shape.vocab_size} up to a multiple of {VOCABULARY_MULTIPLE} and of tensor",
    }
    unsearched = dict.fromkeys(("virtual_pipeline", "context", "expert_tensor"), "1: not searched yet")
    if not terms.shape.num_experts:
        unsearched["expert"] = "1: a dense model"
    derived |= _why_split(best, terms.shape.num_layers)
    unsearched["fsdp"] = "the distributed optimizer shards what is sharded"
    modules = ", ".join(best.recompute_modules) or "none"
    derived |= {
        "recompute_method": f"recompute {best.recompute}: only full recompute cuts the layers into units",
        "recompute_layers": f"recompute {best.recompute}: a layer a unit where all are recomputed keeps the least",
    }
    for index in range(len(best.recompute_modules)):
        derived[f"recompute_modules[{index}]"] = f"recompute selective: {modules} (Korthikanti et al. 2022, section 5)"
    if not best.recompute_modules:
        derived["recompute_modules"] = f"recompute {best.recompute}: no modules are named"
    reasons = {f"layout.{name}": found for name in searched}
    reasons |= {f"layout.{name}": Reason("derived", text) for name, text in derived.items()}
    return reasons | {f"layout.{name}": Reason("default", text) for name, text in unsearched.items()}


def _why_split(best: Layout, num_layers: int) -> dict[str, str]:
    if best.pipeline == 1:
        text = "one stage holds all layers"
    elif best.last_stage_layers:
        text = (
            f"{num_layers} layers do not divide by pipeline {best.pipeline}: the last stage, which has the output layer, holds "
            f"{best.last_stage_layers}, the others {-(-num_layers // best.pipeline)}"
        )
    else:
        parts = [f"{num_layers} layers"]
        parts += ["the embedding"] * best.embedding_as_layer + ["the loss"] * best.loss_as_layer
        total = num_layers + best.embedding_as_layer + best.loss_as_layer
        stages = best.pipeline * best.virtual_pipeline
        in_all = f" = {total}" if len(parts) > 1 else ""
        text = f"{' + '.join(parts)}{in_all}: {total // stages} on each of {stages}"
    names = ("first_stage_layers", "last_stage_layers", "embedding_as_layer", "loss_as_layer")
    return dict.fromkeys(names, text)
