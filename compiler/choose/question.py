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
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.sizes import Sizes
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.search import balance, balanced_tokens, least, root

FORWARD_SHARE = 1 / 3  # of the training FLOPs a token: the backward pass has twice the forward's
ROOM = 0.97  # of a limit on training, for a size that is trained longer than it must to be used for less: shapes come in steps


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


def answer(law: Law, sizes: Sizes, question: Question, table: Sizes | None = None) -> tuple[Floats, Floats]:
    """(total parameters, tokens), one value for each draw of the law's constants; nan where nothing answers. `sizes` may be the
    one row of a real shape: then `table` is that of its family, which says what other sizes would cost.

    A law that states a frontier alone (`minimises` is false) answers by it. Raises ValueError for a question that such a law
    has no answer to: `needs_loss` says which.
    """
    total = _total(law, sizes, question)
    return total, _tokens(law, sizes, question, total, table or sizes)


def needs_loss(question: Question) -> str:
    """The word for what a law without a loss to minimise cannot answer; "" for a question that every law answers."""
    if question.target_loss:
        return "target loss"
    settled = question.parameters and question.tokens
    bought = question.limited and (question.parameters or question.tokens)
    if question.inference_tokens and not (settled or bought):
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


def _tokens(law: Law, sizes: Sizes, question: Question, total: Floats, table: Sizes) -> Floats:
    counted = sizes.at(sizes.counted(law.facts.counts), total)
    if question.tokens:
        return np.full_like(total, question.tokens)
    if question.target_loss:
        return law.tokens_for_loss(question.target_loss, counted)
    if question.limited:
        return affordable_tokens(question, sizes.at(sizes.flops_per_token, total))
    if not law.minimises:
        return law.tokens_for(counted)
    elasticity = np.interp(np.log(total), np.log(table.total), table.elasticity(law.facts.counts))
    return balanced_tokens(law, counted, question.inference_tokens, elasticity)


def _total(law: Law, sizes: Sizes, question: Question) -> Floats:
    counts, most = law.facts.counts, question.most_parameters
    if question.parameters:
        return np.array([question.parameters])
    if question.tokens and question.target_loss:
        return np.atleast_1d(sizes.total_of(counts, law.parameters_for_loss(question.target_loss, question.tokens)))
    if question.tokens and not question.limited:
        if not law.minimises:
            return np.minimum(np.atleast_1d(sizes.total_of(counts, law.parameters_for(question.tokens))), most)
        counted, each = sizes.counted(counts)[:, None], sizes.elasticity(counts)[:, None]
        given = balance(law, counted, np.full((1, 1), question.tokens), question.inference_tokens, each)
        return np.minimum(root(sizes.total, -given), most)
    rows = sizes.total <= most
    total, each = sizes.total[rows], sizes.flops_per_token[rows, None]
    counted = sizes.counted(counts)[rows, None]
    if question.target_loss:
        tokens = law.tokens_for_loss(question.target_loss, counted)
        training, cost = each * tokens, each * (tokens + FORWARD_SHARE * question.inference_tokens)
        # Where no size keeps the limit, the one that is nearest to it says by how much.
        kept = training <= ROOM * question.training_flops
        return least(total, np.where(kept.any(axis=0), np.where(kept, cost, np.inf), training))
    affordable = affordable_tokens(question, each)
    if question.tokens or not law.minimises:
        wanted = np.asarray(question.tokens) if question.tokens else law.tokens_for(counted)
        with np.errstate(divide="ignore"):
            return root(total, np.log(wanted / affordable))
    return least(total, np.where(affordable >= 1, law.loss(counted, np.maximum(affordable, 1.0)), np.inf))
