"""Cross-entropy over a vocabulary that is cut over tensor ranks, and the normaliser of its softmax beside it.

Megatron-Core's own gives the negative log-likelihood alone, and overwrites the logits; a z-loss needs the normaliser too. Both
come here from one pass over the logits, and so do their gradients.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., this rank's part of the vocabulary], which are overwritten, and labels [...] -> (nats, log Z), each [...] in
    float32, the same on every tensor rank: log Z = log sum exp(logits), nats = log Z - the label's logit."""
    nats, log_z = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return nats, log_z


@contextlib.contextmanager
def kept_normalisers(gpt: Any) -> Iterator[list[Tensor]]:
    """While it lasts, a GPTModel that is given labels leaves the log Z of each of its losses in the list, [b, s]: the last one is
    that of the next token, after those of tokens further on (MTP)."""
    kept: list[Tensor] = []

    def loss(labels: Tensor, logits: Tensor) -> Tensor:
        nats, log_z = cross_entropy(logits, labels.transpose(0, 1).contiguous())
        kept.append(log_z.transpose(0, 1).contiguous())
        return nats.transpose(0, 1).contiguous()

    gpt.compute_language_model_loss = loss  # on the object, before its class's
    try:
        yield kept
    finally:
        del gpt.compute_language_model_loss


class _CrossEntropy(torch.autograd.Function):
    """In terms of Megatron-Core's steps, which compute in the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        steps = VocabParallelCrossEntropy
        logits, largest = steps.calculate_logits_max(logits)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        size = logits.shape[-1]
        begin, end = VocabUtility.vocab_range_from_per_partition_vocab_size(size, group.rank(), group.size())
        elsewhere, places, chosen, total, exponentials = steps.calculate_predicted_logits(
            logits, labels, largest, begin, end
        )
        dist.all_reduce(chosen, group=group)
        dist.all_reduce(total, group=group)
        softmax, nats = steps.calculate_cross_entropy_loss(exponentials, chosen, total)
        ctx.save_for_backward(softmax, elsewhere, places)
        return nats, total.log() + largest

    @staticmethod
    def backward(ctx: Any, of_nats: Tensor, of_log_z: Tensor) -> tuple[Tensor, None]:
        softmax, elsewhere, places = ctx.saved_tensors
        softmax.mul_((of_nats + of_log_z).unsqueeze(-1))
        rows = softmax.view(-1, softmax.shape[-1])
        here = of_nats.reshape(-1) * (~elsewhere).reshape(-1)
        rows[torch.arange(len(rows), device=rows.device), places] -= here
        return softmax, None
