"""How large a model, on how many tokens: the spec pins, a scaling law answers the rest, in the exact FLOPs of the family's sizes.

| pinned | parameters | tokens |
|---|---|---|
| size and tokens | pinned | pinned |
| size, target loss | pinned | where the loss is reached |
| size, budget | pinned | what the budget buys |
| size | pinned | the law's best for the size |
| tokens, target loss | where the loss is reached | pinned |
| tokens, budget | what the budget buys | pinned |
| tokens | the law's best for the tokens | pinned |
| target loss | the cheapest run that reaches it | where the loss is reached |
| budget | the least loss that it buys | what it buys |

Inference tokens count in every cost: a model that is used much is best smaller, and trained longer (Sardana and Frankle 2023,
arXiv 2401.00448). All of it is one search over a table of sizes: every law is asked in its own N, and one whose constants are
columns (bootstrap draws) is answered column by column.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.sizes import Sizes
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.laws.law import Law

FORWARD_SHARE = 1 / 3  # of the training FLOPs a token: the backward pass has twice the forward's
STEP = 1e-3  # of a logarithm: half the distance of a central difference
FEWEST_TOKENS, MOST_TOKENS, TOKEN_ROWS = 1e3, 1e22, 3801


@dataclass(frozen=True)
class Question:
    """What is pinned. Open: 0.0 for a number to find, infinite for a limit."""

    parameters: float = 0.0  # total
    tokens: float = 0.0
    target_loss: float = 0.0  # in the law's unit
    training_flops: float = math.inf  # that training may take
    life_flops: float = math.inf  # that training and inference may take together
    inference_tokens: float = 0.0
    most_parameters: float = math.inf  # total

    @property
    def limited(self) -> bool:
        return math.isfinite(self.training_flops) or math.isfinite(self.life_flops)


def answer(law: Law, sizes: Sizes, question: Question) -> tuple[Floats, Floats]:
    """(total parameters, tokens), one value for each draw of the law's constants; nan where nothing answers.

    A law that states a frontier alone (`minimises` is false) answers by it. Raises ValueError for a question that such a law
    has no answer to: `needs_loss` says which.
    """
    total = _total(law, sizes, question)
    return total, _tokens(law, sizes, question, total)


def needs_loss(question: Question) -> str:
    """The word for what a law without a loss to minimise cannot answer; "" for a question that every law answers."""
    if question.target_loss:
        return "target loss"
    if question.inference_tokens and not (question.parameters and question.tokens):
        return "inference tokens"
    return ""


def life_flops(sizes: Sizes, question: Question, total: Floats, tokens: Floats) -> Floats:
    """FLOPs of training and of inference together."""
    each = sizes.at(sizes.flops_per_token, total)
    return np.asarray(each * (tokens + FORWARD_SHARE * question.inference_tokens))


def affordable_tokens(question: Question, flops_per_token: Floats) -> Floats:
    """Tokens that the limits leave for training; 0.0 where inference alone takes all."""
    for_inference = FORWARD_SHARE * flops_per_token * question.inference_tokens
    most = np.minimum(question.training_flops, question.life_flops - for_inference) / flops_per_token
    return np.asarray(np.maximum(most, 0.0))


def _tokens(law: Law, sizes: Sizes, question: Question, total: Floats) -> Floats:
    counted = sizes.at(sizes.counted(law.facts.counts), total)
    if question.tokens:
        return np.full_like(total, question.tokens)
    if question.target_loss:
        return law.tokens_for_loss(np.float64(question.target_loss), counted)
    if question.limited:
        return affordable_tokens(question, sizes.at(sizes.flops_per_token, total))
    if question.inference_tokens:
        return _life_tokens(law, question, counted)
    return law.tokens_for(counted)


def _total(law: Law, sizes: Sizes, question: Question) -> Floats:
    most = question.most_parameters
    if question.parameters:
        return np.asarray([question.parameters])
    if question.tokens and not question.limited and not question.target_loss:
        if question.inference_tokens:
            return np.minimum(_life_total(law, sizes, question), most)
        best = law.parameters_for(np.float64(question.tokens))
        return np.minimum(np.atleast_1d(sizes.total_of(law.facts.counts, best)), most)
    if question.tokens and question.target_loss:
        least = law.parameters_for_loss(np.float64(question.target_loss), np.float64(question.tokens))
        return np.atleast_1d(sizes.total_of(law.facts.counts, least))
    rows = sizes.total <= most
    total = sizes.total[rows, None]
    counted = sizes.counted(law.facts.counts)[rows, None]
    each = sizes.flops_per_token[rows, None]
    if question.target_loss:
        tokens = law.tokens_for_loss(np.float64(question.target_loss), counted)
        return _minimum(total, each * (tokens + FORWARD_SHARE * question.inference_tokens))
    affordable = affordable_tokens(question, each)
    if question.tokens:
        return _crossing(total, affordable / question.tokens)
    if not law.minimises:
        return _crossing(total, affordable / law.tokens_for(counted))
    with np.errstate(divide="ignore"):
        loss = law.loss(counted, np.where(affordable >= 1, affordable, np.nan))
    return _minimum(total, loss)


def _minimum(total: Floats, values: Floats) -> Floats:
    """Where each column of `values` is least, by the parabola through the least row and its neighbours; nan without a number."""
    values = np.where(np.isfinite(values), values, np.inf)
    lowest = np.argmin(values, axis=0)
    columns = np.arange(values.shape[1])
    inner = np.clip(lowest, 1, len(values) - 2)
    left, middle, right = (values[inner + shift, columns] for shift in (-1, 0, 1))
    whole = np.isfinite(left) & np.isfinite(right) & (inner == lowest)
    left, middle, right = (np.where(whole, part, 0.0) for part in (left, middle, right))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    step = math.log(total[1, 0] / total[0, 0])
    found = total[lowest, 0] * np.exp(np.clip(shift, -1, 1) * step)
    return np.asarray(np.where(np.isfinite(values[lowest, columns]), found, np.nan))


def _crossing(total: Floats, ratio: Floats) -> Floats:
    """Where each falling column of `ratio` is 1; the first or last size where it is not among them; nan where it is 0."""
    with np.errstate(divide="ignore"):
        height = np.log(ratio)
    return np.asarray(
        [
            math.exp(np.interp(0.0, -column[used], np.log(total[used, 0]))) if used.any() else math.nan
            for column in height.T
            for used in (np.isfinite(column),)
        ]
    )


def _balance(law: Law, question: Question, parameters: Floats, tokens: Floats) -> Floats:
    """ln of both sides of Sardana and Frankle's first-order condition: N dL/dN / (D dL/dD) = 1 + D_inference / (3 D)."""

    def slope(change: Callable[[float], Floats]) -> Floats:
        return change(-STEP) - change(STEP)

    by_size = slope(lambda step: law.loss(parameters * math.exp(step), tokens))
    by_tokens = slope(lambda step: law.loss(parameters, tokens * math.exp(step)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(by_size / by_tokens) - np.log1p(FORWARD_SHARE * question.inference_tokens / tokens))


def _life_tokens(law: Law, question: Question, counted: Floats) -> Floats:
    """Tokens for which the size is the best of all that reach the same loss, inference counted."""
    tokens = np.geomspace(FEWEST_TOKENS, MOST_TOKENS, TOKEN_ROWS)
    balance = _balance(law, question, counted[None, :], tokens[:, None])
    return np.asarray([_root(tokens, column) for column in balance.T])


def _life_total(law: Law, sizes: Sizes, question: Question) -> Floats:
    """The best size of all that reach the same loss with the pinned tokens, inference counted."""
    counted = sizes.counted(law.facts.counts)[:, None]
    balance = _balance(law, question, counted, np.full((1, 1), question.tokens))
    return np.asarray([_root(sizes.total, -column) for column in balance.T])


def _root(places: Floats, rising: Floats) -> float:
    """Where the rising values are 0, interpolated in the logarithm of the place."""
    used = np.isfinite(rising)
    return math.exp(np.interp(0.0, rising[used], np.log(places[used]))) if used.any() else math.nan
