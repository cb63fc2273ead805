"""One training step, and forward passes for evaluation, through Megatron-Core's pipeline schedules.

A batch is a dict of tensors [micro_batch, sequence]: `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32); or it is
a packed row (packing.py), which has `segments` too.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from trainwright.runtime.errors import Diverged, Unsupported
from trainwright.runtime.megatron import packing
from trainwright.runtime.megatron.losses import Loss, segment_sums, token_loss
from trainwright.runtime.megatron.model import Model

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What one step measured, the same on every rank."""

    loss: float  # mean over the items (tokens in nats, or pairs) of the global batch, before the update
    grad_norm: float  # global norm before clipping
    tokens: int  # with a `loss_mask` of 1
    figures: Mapping[str, float]  # the loss's other means over the items


@dataclass(frozen=True)
class Score:
    """What a model says of one sequence's counted tokens."""

    log_probability: float  # their sum (nats)
    tokens: int
    is_greedy: bool  # each of them is the likeliest of the vocabulary; False where it was not asked for


def train_step(model: Model, batches: Sequence[Batch], loss: Loss = token_loss) -> Step:
    """Forward and backward over this data rank's micro-batches (one shape, one number on every rank), then the update.

    Raises Diverged when the loss (then nothing is updated) or the gradient norm is not finite; Unsupported for packed rows
    where the program's config weighs micro-batches alike.
    """
    if "segments" in batches[0] and not model.config.calculate_per_token_loss:
        raise Unsupported(
            "packed rows hold unlike numbers of tokens, and model=calculate_per_token_loss=False weighs every row alike: "
            "write calculate_per_token_loss=True"
        )
    for chunk in model.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    batches = [_fit_tensor_ranks(model, batch) for batch in batches]
    forward = partial(_forward_loss, model, loss)
    reports = _run_schedule(model, batches, len(batches), batches[0]["tokens"].shape, forward, forward_only=False)
    means, _, tokens = _sum_over_ranks(model, reports, loss)
    if not math.isfinite(means[0]):
        raise Diverged(f"the loss is {means[0]}: lower the learning rate, lengthen the warm-up, or look at the data")
    _, grad_norm, _ = model.optimizer.step()
    if not math.isfinite(grad_norm):
        raise Diverged(f"the gradient norm is {grad_norm} at loss {means[0]:.4f}: lower the learning rate")
    return Step(means[0], float(grad_norm), tokens, dict(zip(loss.figures, means[1:], strict=True)))


def evaluate_nats(model: Model, batches: Sequence[Batch]) -> tuple[float, int]:
    """Total negative log-likelihood (nats) and number of tokens where `loss_mask` is 1.

    Every rank passes the same batches, all of one shape; the data ranks share them out, and every rank gets the sum.
    """
    mine = [_fit_tensor_ranks(model, batch) for batch in _share(batches)]
    forward = partial(_forward_loss, model, token_loss)
    shape = mine[0]["tokens"].shape if mine else (0, 0)
    with _inference(model):
        reports = _run_schedule(model, mine, len(mine), shape, forward, forward_only=True)
    _, sums, tokens = _sum_over_ranks(model, reports, token_loss)
    return sums[0], tokens


def score_sequences(
    model: Model, sequences: Sequence[packing.Sequence], *, row_tokens: int, greedy: bool = False
) -> list[Score]:
    """The log-probability of each sequence's counted tokens, and (`greedy`) whether each is the likeliest at its place.

    Every rank passes the same sequences; the data ranks share them out, packed into rows of `row_tokens` positions, and every
    rank gets all scores. Raises ValueError for a sequence that takes more positions than the model was built for.
    """
    sizes, limit = [sequence.positions for sequence in sequences], model.embedding.sequence_length
    longest = max(sizes, default=0)
    if longest > limit:
        raise ValueError(f"a sequence takes {longest} positions, and the model has {limit}")
    tensor = int(parallel_state.get_tensor_model_parallel_world_size())
    length = -(-max(longest, min(row_tokens, sum(sizes))) // tensor) * tensor
    mine = _share(packing.best_fit(sizes, length))
    batches = (packing.packed_row([sequences[index] for index in row], length, pad=0) for row in mine)
    with _inference(model):
        reports = _run_schedule(
            model,
            batches,
            len(mine),
            (1, length),
            partial(_forward_scores, model, greedy),
            forward_only=True,
            collect=True,
        )
    sums = torch.zeros(len(sequences), 2, dtype=torch.float64)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for row, report in zip(mine, reports, strict=False):  # reports are empty but on the last stage
            sums[row] = report[: len(row)].double().cpu()
    sums = sums.to(model.platform.device)
    dist.all_reduce(sums)
    return [
        Score(-nats, sum(sequence.counts), greedy and misses == 0)
        for sequence, (nats, misses) in zip(sequences, sums.tolist(), strict=True)
    ]


def forward_logits(model: Model, tokens: Tensor) -> Tensor:
    """Logits after each position: tokens [sequence] (int64, any device, the same on every rank) -> [sequence, padded
    vocabulary] in float32, on every rank."""
    length = tokens.numel()
    tensor = int(parallel_state.get_tensor_model_parallel_world_size())
    padded = -(-length // tensor) * tensor  # sequence parallelism cuts the sequence evenly; what follows cannot be seen
    batch = {
        "tokens": torch.nn.functional.pad(tokens.view(1, -1), (0, padded - length)),
        "position_ids": torch.arange(padded).view(1, -1),
    }
    with _inference(model):
        forward = partial(_forward_outputs, model)
        outputs = _run_schedule(model, [batch], 1, (1, padded), forward, forward_only=True, collect=True)
        if parallel_state.is_pipeline_last_stage():
            logits: Tensor = gather_from_tensor_model_parallel_region(outputs[0]).float().contiguous()
        else:
            logits = torch.empty(1, padded, model.embedding.padded_vocab_size, device=model.platform.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return logits[0, :length]


def _run_schedule(
    model: Model,
    batches: Iterable[Batch],
    count: int,
    shape: Sequence[int],
    forward: Any,
    *,
    forward_only: bool,
    collect: bool = False,
) -> list[Any]:
    """What the loss function reported for each of `count` micro-batches of one [micro_batch, sequence] shape: empty except on
    the last pipeline stage."""
    if not count:
        return []
    schedule = get_forward_backward_func()
    interleaved = len(model.ddp) > 1
    full = count
    if interleaved and forward_only:  # a pipeline's worth of micro-batches passes a chunk together
        full = (
            -(-count // model.config.microbatch_group_size_per_vp_stage)
            * model.config.microbatch_group_size_per_vp_stage
        )
    iterators = itertools.tee(_repeat_last(batches), len(model.ddp))
    reports: list[Any] = schedule(
        forward_step_func=forward,
        data_iterator=list(iterators) if interleaved else iterators[0],
        model=list(model.ddp),
        num_microbatches=full,
        seq_length=shape[1],
        micro_batch_size=shape[0],
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return reports[:count]


def _repeat_last(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and then the last one as often as it is asked for."""
    batch = None
    for batch in batches:
        yield batch
    while batch is not None:
        yield batch


def _forward_loss(model: Model, loss: Loss, batches: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
    batch = _to_device(model, next(batches))
    output = module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **_packing(model, batch))
    return output, partial(_measure, loss, batch)


def _forward_outputs(model: Model, batches: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
    batch = _to_device(model, next(batches))
    return module(batch["tokens"], batch["position_ids"], None), lambda output, non_loss_data: output


def _forward_scores(model: Model, greedy: bool, batches: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
    """Reports [segments, 2]: nats, and how many counted tokens are not the likeliest."""
    batch = _to_device(model, next(batches))
    output = module(batch["tokens"], batch["position_ids"], None, **_packing(model, batch))

    def report(logits: Tensor, non_loss_data: bool) -> Tensor:
        misses = torch.zeros_like(batch["loss_mask"])
        if greedy:  # before the loss, which overwrites the logits
            misses = (_likeliest(model, logits) != batch["labels"]).float()
        nats = (
            model.chunks[-1].compute_language_model_loss(batch["labels"], logits.transpose(0, 1).contiguous()).float()
        )
        columns = (segment_sums(values * batch["loss_mask"], batch["segments"]) for values in (nats, misses))
        return torch.stack(tuple(columns), dim=1)

    return output, report


def _likeliest(model: Model, logits: Tensor) -> Tensor:
    """logits [b, s, this rank's part of the vocabulary] -> the token of the greatest, of the whole vocabulary: [b, s]."""
    size, group = logits.shape[-1], parallel_state.get_tensor_model_parallel_group()
    ids = torch.arange(size, device=logits.device) + size * group.rank()
    best, place = logits.masked_fill(ids >= model.embedding.vocab_size, -math.inf).max(-1)
    of_all = best.clone()
    dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
    token = torch.where(best == of_all, ids[place], model.embedding.padded_vocab_size)
    dist.all_reduce(token, op=dist.ReduceOp.MIN, group=group)
    return token


def _measure(loss: Loss, batch: Batch, nats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the loss, the number of its items, and a report (float64): sum, items, tokens, figures.

    Three results, not two: given the sum and the count, Megatron-Core itself divides, by all items of the global batch with
    calculate_per_token_loss, else by the items of the micro-batch and by micro-batches; for a ready mean it would multiply
    the gradients by the context-parallel degree.
    """
    totals = loss.measure(nats.float(), batch)
    report = torch.stack((totals.loss.detach(), totals.items, batch["loss_mask"].sum()))
    # A copy: Megatron-Core divides the sum in place.
    return totals.loss, totals.items.to(torch.int), torch.cat((report, totals.figures)).double()


def _sum_over_ranks(model: Model, reports: Sequence[Tensor], loss: Loss) -> tuple[list[float], list[float], int]:
    """(means over the items of loss and figures; their sums; tokens), over the reports of all ranks."""
    total = torch.zeros(3 + len(loss.figures), dtype=torch.float64, device=model.platform.device)
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:  # tensor ranks hold the same
        total += torch.stack(list(reports)).sum(0)
    dist.all_reduce(total)
    nats, items, tokens, *figures = total.tolist()
    sums = [nats, *figures]
    return [value / max(items, 1) for value in sums], sums, round(tokens)


def _share(items: Sequence[Any]) -> Sequence[Any]:
    """This data rank's part."""
    return items[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def _fit_tensor_ranks(model: Model, batch: Batch) -> Batch:
    """Sequence parallelism cuts a row evenly."""
    if "segments" not in batch or not model.config.sequence_parallel:
        return batch
    return packing.pad_row(batch, parallel_state.get_tensor_model_parallel_world_size())


def _packing(model: Model, batch: Batch) -> dict[str, Any]:
    if "segments" not in batch:
        return {}
    return {"packed_seq_params": packing.segment_parameters(batch["segments"], model.platform.device)}


@contextlib.contextmanager
def _inference(model: Model) -> Iterator[None]:
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


def _to_device(model: Model, batch: Batch) -> dict[str, Tensor]:
    """All but `segments`, by which tensors are cut: those are read on the host."""
    device = model.platform.device
    return {
        name: tensor if name == "segments" else tensor.to(device, non_blocking=True) for name, tensor in batch.items()
    }
