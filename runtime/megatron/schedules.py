"""Micro-batches through Megatron-Core's pipeline schedules, and what each rank gets of them."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from trainwright.runtime.megatron import context
from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.model import Model

Batch = Mapping[str, Tensor]
# Of a batch on the device and this rank's part of it: what the model says (schedules pass it on to the next stage), and what
# the last stage makes of that.
Forward = Callable[[Any, Batch, context.Part], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Rows:
    """Micro-batches of one shape once they are padded."""

    batches: Iterable[Batch]
    count: int  # how many of them are asked about
    micro_batch: int
    length: int  # of a row over all context ranks, with its padding
    runs: int = 0  # how many are run at least: beyond `count` the last one again


def share(model: Model, items: Sequence[Any]) -> tuple[Sequence[Any], int]:
    """This data rank's part of what all ranks hold, and how many it must run at least, the last one again if need be.

    Where experts are shared out, data ranks wait for each other's tokens, and must run as many.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    mine = items[parallel_state.get_data_parallel_rank() :: ranks]
    if model.config.expert_model_parallel_size == 1:
        return mine, 0
    return mine, -(-len(items) // ranks)


def run_schedule(
    model: Model,
    rows: Rows,
    forward: Forward,
    *,
    forward_only: bool,
    collect: bool = False,
    draws: Draws | None = None,
) -> list[Any]:
    """What the last stage made of each micro-batch (its second result's report, or with `collect` its result): empty on the
    other stages. `draws`: of a step in training."""
    count = max(rows.count, rows.runs)
    if not count:
        return []
    if len(model.chunks) > 1 and forward_only:  # as many micro-batches as there are stages pass a chunk together
        group = model.config.microbatch_group_size_per_vp_stage
        count = -(-count // group) * group
    copies = itertools.tee(_repeat_last(rows.batches), len(model.chunks))
    iterators = [_numbered(chunk, batches) for chunk, batches in enumerate(copies)]

    def step(batches: Iterator[tuple[int, int, Batch]], module: Any) -> tuple[Tensor, Any]:
        chunk, number, batch = next(batches)
        if draws:
            draws.begin(model.config, chunk, number)
        part = context.part_of(batch, rows.length)
        moved = to_device(model, batch)
        read = moved if part.batch is batch else to_device(model, part.batch)
        return forward(module, moved, context.Part(read, part.places))

    schedule = get_forward_backward_func()
    reports: list[Any] = schedule(
        forward_step_func=step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model.ddp),
        num_microbatches=count,
        seq_length=rows.length,
        micro_batch_size=rows.micro_batch,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return reports[: rows.count]


@contextlib.contextmanager
def inference(model: Model) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode comes back after it."""
    training = model.ddp[0].training
    for chunk in model.ddp:
        chunk.eval()
        if model.overlaps_param_gather:
            # Gathering now lets a data rank without batches do nothing: no hook waits for it in the others' forward pass.
            chunk.disable_forward_pre_hook(param_sync=True)
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in model.ddp:
            if model.overlaps_param_gather:
                chunk.enable_forward_pre_hook()
            chunk.train(training)


def to_device(model: Model, batch: Batch) -> dict[str, Tensor]:
    """All but `segments`, by which tensors are cut: those are read on the host."""
    device = model.platform.device
    return {
        name: tensor if name == "segments" else tensor.to(device, non_blocking=True) for name, tensor in batch.items()
    }


def _numbered(chunk: int, batches: Iterable[Batch]) -> Iterator[tuple[int, int, Batch]]:
    for number, batch in enumerate(batches):
        yield chunk, number, batch


def _repeat_last(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and then the last one as often as it is asked for."""
    batch = None
    for batch in batches:
        yield batch
    while batch is not None:
        yield batch
