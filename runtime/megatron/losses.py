"""What is minimised: means over the global batch, however it is cut into micro-batches and shared out to ranks.

A loss sums over the items (tokens, pairs) of one micro-batch and counts them; the loop divides the sum of all by their count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """Of one micro-batch."""

    loss: Tensor  # scalar: sum over its items; what is differentiated
    items: Tensor  # scalar: how many they are
    figures: Tensor  # [len(Loss.figures)]: each summed over the items
    penalty: Tensor | None = (
        None  # scalar: summed over the items, differentiated beside the loss and not reported in it
    )


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["loss_mask"].sum()


@dataclass(frozen=True)
class Loss:
    """`measure` takes nats [b, s] (negative log-likelihood of each label) and the batch, on the model's device but for
    `segments`. `figures` name what is reported beside the loss, as means over the items too. `normalisers`: the batch that it
    takes holds `log_z` [b, s] too, the log of the softmax's normaliser at each token. `items` counts a batch's
    items: a scalar. `further_tokens`: layers that predict tokens further on (MTP) are trained beside it."""

    measure: Callable[[Tensor, Mapping[str, Tensor]], Totals]
    figures: tuple[str, ...] = ()
    normalisers: bool = False
    items: Callable[[Mapping[str, Tensor]], Tensor] = _targets
    further_tokens: bool = True


def text_loss(z_loss: float) -> Loss:
    """Nats a token, with a penalty z_loss x (log Z)^2 a token (PaLM, Chowdhery et al. 2022, section 5: 1e-4), which keeps
    the softmax's normaliser Z near 1. The figure `z_loss` is the penalty; the loss is reported without it."""
    return Loss(partial(_penalised, z_loss), ("z_loss",), normalisers=True) if z_loss else token_loss


def preference_loss(beta: float, nll: float) -> Loss:
    """Direct preference optimisation with a likelihood term, over packed rows of pairs (chosen, then rejected).

    Of a pair: -log sigmoid(beta x margin) + nll x the chosen answer's nats a token. The margin (nats) is how much more than
    the reference the model prefers the chosen answer: of the difference of summed log-probabilities, chosen - rejected, the
    model's less the reference's. The batch carries the latter's as `reference` [1, segments]; padding's is not looked at.

    Further tokens are not predicted in training: half of the answers are to be avoided.

    Figures: `margin`; `accuracy`, the share of pairs whose margin is above 0; `chosen_log_probability`, summed, the model's.
    """
    figures = ("margin", "accuracy", "chosen_log_probability")
    return Loss(partial(_preference, beta, nll), figures, items=_pairs, further_tokens=False)


def segment_sums(values: Tensor, segments: Tensor) -> Tensor:
    """values [1, length] of a packed row, summed over each of its segments (their lengths, on the host): [segments]."""
    return torch.stack([part.sum() for part in torch.split(values[0], segments.tolist())])


def _tokens(nats: Tensor, batch: Mapping[str, Tensor]) -> Totals:
    return Totals((nats * batch["loss_mask"]).sum(), _targets(batch), nats.new_zeros(0))


def _pairs(batch: Mapping[str, Tensor]) -> Tensor:
    return batch["loss_mask"].new_tensor(float(batch["segments"].numel() // 2))  # an odd one out is padding


def _penalised(coefficient: float, nats: Tensor, batch: Mapping[str, Tensor]) -> Totals:
    totals = _tokens(nats, batch)
    penalty = coefficient * (batch["log_z"].square() * batch["loss_mask"]).sum()
    return Totals(totals.loss, totals.items, penalty.detach().view(1), penalty)


def _preference(beta: float, nll: float, nats: Tensor, batch: Mapping[str, Tensor]) -> Totals:
    mask, segments = batch["loss_mask"], batch["segments"]
    items = _pairs(batch)
    pairs = int(items)
    ours = -segment_sums(nats * mask, segments)[: 2 * pairs].view(pairs, 2)
    reference = batch["reference"][0, : 2 * pairs].view(pairs, 2)
    tokens = segment_sums(mask, segments)[: 2 * pairs].view(pairs, 2)
    ratios = ours - reference
    margin = ratios[:, 0] - ratios[:, 1]
    chosen = ours[:, 0]
    losses = -F.logsigmoid(beta * margin) - nll * chosen / tokens[:, 0].clamp(min=1)
    figures = torch.stack((margin.sum(), (margin > 0).sum().to(margin.dtype), chosen.sum())).detach()
    return Totals(losses.sum(), items, figures)


token_loss = Loss(_tokens)
