"""Repeated data: Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 and 6.

L = E + A / N'^alpha + B / D'^beta. D' = U + U R_D (1 - exp(-R / R_D)) with R = D / U - 1 repetitions of U unique tokens; N'
likewise above the size that is best for U tokens: too large a model gains as little as one that sees them too often.
"""

import math

import numpy as np

from trainwright.compiler.facts import LawFacts
from trainwright.compiler.laws.additive import AdditiveLaw
from trainwright.compiler.laws.law import Floats, Number
from trainwright.compiler.laws.search import balanced_parameters, balanced_tokens, least_at_compute


class RepeatedDataLaw(AdditiveLaw):
    """The law for so many unique tokens; without a limit it is additive."""

    def __init__(self, facts: LawFacts, unique_tokens: float = math.inf) -> None:
        super().__init__(facts)
        self.unique_tokens = unique_tokens
        self.fresh = AdditiveLaw(facts)
        self.unique_parameters = (
            float(self.fresh.parameters_for(unique_tokens)) if math.isfinite(unique_tokens) else math.inf
        )

    def with_unique_tokens(self, unique_tokens: float) -> "RepeatedDataLaw":
        """The law for another number of unique tokens."""
        return RepeatedDataLaw(self.facts, unique_tokens)

    def loss(self, parameters: Number, tokens: Number) -> Floats:
        """L(N, D) of D tokens in all, repetitions counted."""
        size, data = self._effective(parameters, "R_N"), self._effective(tokens, "R_D")
        return self.fresh.loss(size, data)

    def tokens_for_loss(self, loss: Number, parameters: Number) -> Floats:
        """D with which N parameters reach a loss; nan where no number of repetitions does."""
        return self._repeated(self.fresh.tokens_for_loss(loss, self._effective(parameters, "R_N")), "R_D")

    def parameters_for_loss(self, loss: Number, tokens: Number) -> Floats:
        """N that reach a loss with D tokens; nan where none do."""
        return self._repeated(self.fresh.parameters_for_loss(loss, self._effective(tokens, "R_D")), "R_N")

    def frontier(self, flops: Number) -> tuple[Floats, Floats]:
        """The best (N, D) for C = 6 N D."""
        return least_at_compute(self, flops) if math.isfinite(self.unique_tokens) else self.fresh.frontier(flops)

    def tokens_for(self, parameters: Number) -> Floats:
        """D for which N is the best size."""
        return (
            balanced_tokens(self, parameters)
            if math.isfinite(self.unique_tokens)
            else self.fresh.tokens_for(parameters)
        )

    def parameters_for(self, tokens: Number) -> Floats:
        """N for which D are the best tokens."""
        return (
            balanced_parameters(self, tokens)
            if math.isfinite(self.unique_tokens)
            else self.fresh.parameters_for(tokens)
        )

    def _unique(self, what: str) -> float:
        return self.unique_tokens if what == "R_D" else self.unique_parameters

    def _effective(self, amount: Number, what: str) -> Floats:
        """N' or D'."""
        amount, unique, star = np.asarray(amount, dtype=np.float64), self._unique(what), self.facts.constants[what]
        if math.isinf(unique):
            return amount
        repeats = np.maximum(amount / unique - 1, 0.0)
        return np.minimum(amount, unique) + unique * star * -np.expm1(-repeats / star)

    def _repeated(self, effective: Floats, what: str) -> Floats:
        """The amount whose N' or D' is `effective`; nan beyond what repetition reaches."""
        unique, star = self._unique(what), self.facts.constants[what]
        if math.isinf(unique):
            return effective
        share = (effective / unique - 1) / star
        reached = share < 1  # nor is nan
        repeats = -star * np.log1p(-np.where(reached, np.maximum(share, 0.0), 0.0))
        return np.where(reached, np.where(effective <= unique, effective, unique * (1 + repeats)), np.nan)
