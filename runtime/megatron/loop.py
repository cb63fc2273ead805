"""One training step, and forward passes for evaluation, through Megatron-Core's pipeline schedules.

A batch is a dict of tensors [micro_batch, sequence]: `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32); or it is
a packed row (packing.py), which has `segments` too.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region
from torch import Tensor

from trainwright.runtime.errors import Diverged, Unsupported
from trainwright.runtime.megatron import context, packing
from trainwright.runtime.megatron.cross_entropy import kept_normalisers
from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.experts import auxiliary_figures, router_losses_weighed
from trainwright.runtime.megatron.losses import Loss, segment_sums, token_loss
from trainwright.runtime.megatron.model import Model
from trainwright.runtime.megatron.schedules import Batch, Rows, inference, run_schedule, share

__all__ = ["Batch", "Score", "Step", "evaluate_nats", "forward_logits", "score_sequences", "train_step"]


@dataclass(frozen=True)
class Step:
    """What one step measured, the same on every rank."""

    loss: float  # mean over the items (tokens in nats, or pairs) of the global batch, before the update
    grad_norm: float  # global norm before clipping
    tokens: int  # with a `loss_mask` of 1
    figures: Mapping[str, float]  # the loss's other means over the items, and losses that the model adds by itself


@dataclass(frozen=True)
class Score:
    """What a model says of one sequence's counted tokens."""

    log_probability: float  # their sum (nats)
    tokens: int
    is_greedy: bool  # each of them is the likeliest of the vocabulary; False where it was not asked for


def train_step(model: Model, batches: Sequence[Batch], loss: Loss = token_loss, draws: Draws | None = None) -> Step:
    """Forward and backward over this data rank's micro-batches (one shape, one number on every rank), then the update.

    `draws` seeds what dropout draws from; without it the generators go on as they are. Raises Diverged when the loss (then
    nothing is updated) or the gradient norm is not finite; Unsupported for packed rows where the program's config weighs
    micro-batches alike.
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
    rows = Rows(batches, len(batches), len(batches[0]["tokens"]), _length(model, batches))
    with router_losses_weighed(model.config, batches, loss):
        reports = run_schedule(model, rows, partial(_forward_loss, model, loss), forward_only=False, draws=draws)
    means, _, tokens = _sum_over_ranks(model, reports, loss)
    if not math.isfinite(means[0]):
        raise Diverged(f"the loss is {means[0]}: lower the learning rate, lengthen the warm-up, or look at the data")
    _, grad_norm, _ = model.optimizer.step()
    if not math.isfinite(grad_norm):
        raise Diverged(f"the gradient norm is {grad_norm} at loss {means[0]:.4f}: lower the learning rate")
    figures = dict(zip(loss.figures, means[1:], strict=True))
    figures |= auxiliary_figures(model.config, loss, len(batches), model.platform.device)
    return Step(means[0], float(grad_norm), tokens, figures)


def evaluate_nats(model: Model, batches: Sequence[Batch]) -> tuple[float, int]:
    """Total negative log-likelihood (nats) and number of tokens where `loss_mask` is 1.

    Every rank passes the same batches, all of one shape; the data ranks share them out, and every rank gets the sum.
    """
    if not batches:
        return 0.0, 0
    mine, runs = share(model, batches)
    rows = Rows(mine or batches[:1], len(mine), len(batches[0]["tokens"]), _length(model, batches), runs)
    with inference(model):
        reports = run_schedule(model, rows, partial(_forward_loss, model, token_loss), forward_only=True)
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
    if not any(sizes):
        return [Score(0.0, 0, greedy) for _ in sequences]
    multiple, chunks = context.multiple_of(model.config), context.chunks_of(context.degree())
    padded = [-(-size // chunks) * chunks for size in sizes]
    length = -(-max(*padded, min(row_tokens, sum(padded))) // multiple) * multiple
    packed = packing.best_fit(padded, length)
    mine, runs = share(model, packed)
    batches = (
        packing.packed_row([sequences[index] for index in row], sum(sizes[index] for index in row), pad=0)
        for row in mine or packed[:1]
    )
    with inference(model):
        reports = run_schedule(
            model,
            Rows(batches, len(mine), 1, length, runs),
            partial(_forward_scores, model, greedy),
            forward_only=True,
            collect=True,
        )
    sums = torch.zeros(len(sequences), 2, dtype=torch.float64)
    if parallel_state.get_tensor_model_parallel_rank() == 0 and context.is_first():
        for row, report in zip(mine, reports, strict=False):  # reports are empty but on the last stage
            sums[row] = report.double().cpu()
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
    batch = {"tokens": tokens.view(1, -1), "position_ids": torch.arange(length).view(1, -1)}
    rows = Rows([batch], 1, 1, context.length_of(model.config, [length]))
    with inference(model):
        outputs = run_schedule(model, rows, partial(_forward_logits, model), forward_only=True, collect=True)
        if parallel_state.is_pipeline_last_stage():
            logits: Tensor = outputs[0]
        else:
            logits = torch.empty(length, model.embedding.padded_vocab_size, device=model.platform.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return logits


def _length(model: Model, batches: Sequence[Batch]) -> int:
    """How long the rows of these batches are made, on every rank."""
    if "segments" not in batches[0]:
        return context.length_of(model.config, [batches[0]["tokens"].shape[1]])
    longest = max(context.length_of(model.config, batch["segments"].tolist()) for batch in batches)
    if context.degree() == 1:
        return longest  # the same everywhere: rows are, and only their sum counts
    everywhere = torch.tensor(longest, device=model.platform.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)  # other data ranks hold other sequences
    return int(everywhere)


def _forward_loss(model: Model, loss: Loss, module: Any, batch: Batch, part: context.Part) -> tuple[Tensor, Any]:
    keep: AbstractContextManager[list[Tensor]] = nullcontext([])
    if loss.normalisers:
        keep = kept_normalisers(model.chunks[-1])
    with keep as kept:
        mask = part.batch["loss_mask"] if loss.further_tokens else torch.zeros_like(part.batch["loss_mask"])
        output = _run(model, module, part, labels=part.batch["labels"], loss_mask=mask)
    return output, partial(_measure, model, loss, batch, part, kept)


def _forward_logits(model: Model, module: Any, batch: Batch, part: context.Part) -> tuple[Tensor, Any]:
    """Reports [row, padded vocabulary] in float32."""

    def report(logits: Tensor, non_loss_data: bool) -> Tensor:
        whole: Tensor = gather_from_tensor_model_parallel_region(logits[0]).float().contiguous()
        if part.places is not None:
            group = parallel_state.get_context_parallel_group()
            whole = gather_from_sequence_parallel_region(whole, group=group)[part.places.to(whole.device)]
        return whole

    return _run(model, module, part), report


def _forward_scores(model: Model, greedy: bool, module: Any, batch: Batch, part: context.Part) -> tuple[Tensor, Any]:
    """Reports [segments, 2]: nats, and how many counted tokens are not the likeliest."""

    def report(logits: Tensor, non_loss_data: bool) -> Tensor:
        labels = part.batch["labels"]
        misses = torch.zeros_like(labels, dtype=torch.float32)
        if greedy:  # before the loss, which overwrites the logits
            misses = (_likeliest(model, logits) != labels).float()
        nats = model.chunks[-1].compute_language_model_loss(labels, logits.transpose(0, 1).contiguous()).float()
        rows = (context.whole_rows(values, part) * batch["loss_mask"] for values in (nats, misses))
        return torch.stack([segment_sums(row, batch["segments"]) for row in rows], dim=1)

    return _run(model, module, part), report


def _run(model: Model, module: Any, part: context.Part, **more: Tensor) -> Tensor:
    """The model's output for this rank's part of a batch. With `labels` [b, s] nats, whose `loss_mask` says which of them
    count in the prediction of further tokens, and else logits."""
    batch, packed = part.batch, {}
    if "segments" in batch:
        packed["packed_seq_params"] = packing.segment_parameters(batch["segments"], model.platform.device)
    output: Tensor = module(batch["tokens"], batch["position_ids"], None, **more, **packed)
    return output


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


def _measure(
    model: Model, loss: Loss, batch: Batch, part: context.Part, kept: Sequence[Tensor], nats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the loss, the number of its items, and a report (float64): sum, items, tokens, figures.

    Three results, not two: given the sum and the count, Megatron-Core itself divides, by all items of the global batch with
    calculate_per_token_loss, else by the items of the micro-batch and by micro-batches; for a ready mean it would multiply
    the gradients by the context-parallel degree.

    Every context rank has the whole rows' loss, and differentiates it by its own nats: the ranks' gradients add up to the whole.
    Megatron-Core adds up the items of all ranks, or takes the mean of their gradients.
    """
    if loss.normalisers:
        batch = {**batch, "log_z": context.whole_rows(kept[-1], part)}
    totals = loss.measure(context.whole_rows(nats.float(), part), batch)
    report = torch.stack((totals.loss.detach(), totals.items, batch["loss_mask"].sum()))
    report = torch.cat((report, totals.figures)).double()  # a copy: Megatron-Core divides the sum in place
    minimised = totals.loss if totals.penalty is None else totals.loss + totals.penalty
    if model.config.calculate_per_token_loss:
        items = totals.items if context.is_first() else torch.zeros_like(totals.items)
        return minimised, items.to(torch.int), report
    return minimised * context.degree(), totals.items.to(torch.int), report


def _sum_over_ranks(model: Model, reports: Sequence[Tensor], loss: Loss) -> tuple[list[float], list[float], int]:
    """(means over the items of loss and figures; their sums; tokens), over the reports of all ranks."""
    total = torch.zeros(3 + len(loss.figures), dtype=torch.float64, device=model.platform.device)
    # tensor and context ranks hold the same
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0 and context.is_first():
        total += torch.stack(list(reports)).sum(0)
    dist.all_reduce(total)
    nats, items, tokens, *figures = total.tolist()
    sums = [nats, *figures]
    return [value / max(items, 1) for value in sums], sums, round(tokens)
