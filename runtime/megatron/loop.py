"""One training step, and forward passes for evaluation and generation, through Megatron-Core's pipeline schedules.

A batch is a dict of tensors [micro_batch, sequence]: `tokens`, `labels`, `position_ids` (int64), `loss_mask` (float32).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from trainwright.runtime.errors import Diverged
from trainwright.runtime.megatron.model import Model

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Step:
    """What one step measured, the same on every rank."""

    loss: float  # nats a token, mean over the global batch, before the update
    grad_norm: float  # global norm before clipping
    tokens: int  # that counted in the loss


def train_step(model: Model, batches: Sequence[Batch]) -> Step:
    """Forward and backward over this data rank's micro-batches (one shape, one number on every rank), then the update.

    Raises Diverged when the loss (then nothing is updated) or the gradient norm is not finite.
    """
    model.ddp.train()
    model.ddp.zero_grad_buffer()
    model.optimizer.zero_grad()
    reports = _run_schedule(model, batches, partial(_forward_loss, model), forward_only=False)
    nats, tokens = _sum_over_ranks(model, reports, parallel_state.get_tensor_model_parallel_rank() == 0)
    loss = nats / max(tokens, 1)
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss}: lower the learning rate, lengthen the warm-up, or look at the data")
    _, grad_norm, _ = model.optimizer.step()
    if not math.isfinite(grad_norm):
        raise Diverged(f"the gradient norm is {grad_norm} at loss {loss:.4f}: lower the learning rate")
    return Step(loss=loss, grad_norm=float(grad_norm), tokens=tokens)


def evaluate_nats(model: Model, batches: Sequence[Batch]) -> tuple[float, int]:
    """Total negative log-likelihood (nats) and number of tokens where `loss_mask` is 1.

    Every rank passes the same batches, all of one shape; the data ranks share them out, and every rank gets the sum.
    """
    mine = batches[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    with _inference(model):
        reports = _run_schedule(model, mine, partial(_forward_loss, model), forward_only=True) if mine else []
    return _sum_over_ranks(model, reports, parallel_state.get_tensor_model_parallel_rank() == 0)


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
        outputs = _run_schedule(model, [batch], partial(_forward_outputs, model), forward_only=True, collect=True)
        if parallel_state.is_pipeline_last_stage():
            logits: Tensor = gather_from_tensor_model_parallel_region(outputs[0]).float().contiguous()
        else:
            logits = torch.empty(1, padded, model.embedding.padded_vocab_size, device=model.platform.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return logits[0, :length]


def _run_schedule(
    model: Model, batches: Sequence[Batch], forward: Any, *, forward_only: bool, collect: bool = False
) -> list[Any]:
    """What the loss function reported for each micro-batch: empty except on the last pipeline stage."""
    micro_batch, sequence = batches[0]["tokens"].shape
    schedule = get_forward_backward_func()
    reports: list[Any] = schedule(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=[model.ddp],
        num_microbatches=len(batches),
        seq_length=sequence,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
        collect_non_loss_data=collect,
    )
    return reports


def _forward_loss(model: Model, batches: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
    batch = _to_device(model, next(batches))
    output = module(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_masked_loss, batch["loss_mask"])


def _forward_outputs(model: Model, batches: Iterator[Batch], module: Any) -> tuple[Tensor, Any]:
    batch = _to_device(model, next(batches))
    return module(batch["tokens"], batch["position_ids"], None), lambda output, non_loss_data: output


def _masked_loss(loss_mask: Tensor, nats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of nats [b, s]: their sum over the mask, the mask's size, and a report of both (float64).

    Three results, not two: given the sum and the count, Megatron-Core itself divides by tokens and by micro-batches; for a
    ready mean it would multiply the gradients by the context-parallel degree.
    """
    total = (nats.float() * loss_mask).sum()
    count = loss_mask.sum()
    # float64 makes it a copy: Megatron-Core divides `total` in place
    return total, count.to(torch.int), torch.stack((total.detach().double(), count.double()))


def _sum_over_ranks(model: Model, reports: Sequence[Tensor], counts: bool) -> tuple[float, int]:
    """Sum reports (nats, tokens) over all ranks; of tensor ranks, which hold the same, only the first `counts`."""
    total = torch.zeros(2, dtype=torch.float64, device=model.platform.device)
    if counts and reports:
        total += torch.stack(list(reports)).sum(0)
    dist.all_reduce(total)
    nats, tokens = total.tolist()
    return nats, round(tokens)


@contextlib.contextmanager
def _inference(model: Model) -> Iterator[None]:
    training = model.ddp.training
    model.ddp.eval()
    if model.overlaps_param_gather:
        # Gathering now lets a data rank without batches do nothing: no hook waits for it in the others' forward pass.
        model.ddp.disable_forward_pre_hook(param_sync=True)
    try:
        with torch.no_grad():
            yield
    finally:
        if model.overlaps_param_gather:
            model.ddp.enable_forward_pre_hook()
        model.ddp.train(training)


def _to_device(model: Model, batch: Batch) -> dict[str, Tensor]:
    return {name: tensor.to(model.platform.device, non_blocking=True) for name, tensor in batch.items()}
