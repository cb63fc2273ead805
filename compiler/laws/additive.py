"""L(N, D) = E + A / N^alpha + B / D^beta: approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556), section 3.3, and its refits.

Closed forms, with a = beta / (alpha + beta), b = alpha / (alpha + beta) and G = (alpha A / (beta B))^(1 / (alpha + beta)): the
least loss at C = 6 N D is at N = G (C / 6)^a, D = (C / 6)^b / G (their equation 4); along it alpha A N^-alpha = beta B D^-beta.
"""

from dataclasses import replace

import numpy as np

from trainwright.compiler.facts import LawFacts
from trainwright.compiler.laws.law import Floats, Law, Number

CONSTANTS = ("A", "B", "E", "alpha", "beta")


class AdditiveLaw(Law):
    """Constants as numbers, or as arrays of one shape."""

    def __init__(self, facts: LawFacts, **constants: Number) -> None:
        """`constants` replace those of the facts."""
        self.facts = facts
        given = {**facts.constants, **constants}
        self.A, self.B, self.E, self.alpha, self.beta = (
            np.asarray(given[name], dtype=np.float64) for name in CONSTANTS
        )

    def frontier(self, flops: Number) -> tuple[Floats, Floats]:
        """The best (N, D) for C = 6 N D."""
        products = np.asarray(flops, dtype=np.float64) / 6
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = scale * products ** (self.beta / (self.alpha + self.beta))
        return np.asarray(parameters), np.asarray(products / parameters)

    def tokens_for(self, parameters: Number) -> Floats:
        """D for which N is the best size."""
        ratio = self.beta * self.B / (self.alpha * self.A)
        return np.asarray((ratio * np.asarray(parameters, dtype=np.float64) ** self.alpha) ** (1 / self.beta))

    def parameters_for(self, tokens: Number) -> Floats:
        """N for which D are the best tokens."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return np.asarray((ratio * np.asarray(tokens, dtype=np.float64) ** self.beta) ** (1 / self.alpha))

    def loss(self, parameters: Number, tokens: Number) -> Floats:
        """L(N, D)."""
        by_size = self.A * np.asarray(parameters, dtype=np.float64) ** -self.alpha
        return np.asarray(self.E + by_size + self.B * np.asarray(tokens, dtype=np.float64) ** -self.beta)

    def tokens_for_loss(self, loss: Number, parameters: Number) -> Floats:
        """D = (B / (L - E - A N^-alpha))^(1 / beta); nan where nothing is left for it."""
        left = loss - self.E - self.A * np.asarray(parameters, dtype=np.float64) ** -self.alpha
        return _inverse(self.B, left, self.beta)

    def parameters_for_loss(self, loss: Number, tokens: Number) -> Floats:
        """N = (A / (L - E - B D^-beta))^(1 / alpha); nan where nothing is left for it."""
        left = loss - self.E - self.B * np.asarray(tokens, dtype=np.float64) ** -self.beta
        return _inverse(self.A, left, self.alpha)

    def least_loss(self) -> float:
        """E, the irreducible loss."""
        return float(np.min(self.E))

    def draws(self) -> "AdditiveLaw | None":
        """The law at the bootstrap draws of its facts."""
        if not self.facts.draws:
            return None
        columns = {name: np.array(values) for name, values in self.facts.draws.items()}
        return AdditiveLaw(replace(self.facts, draws={}), **columns)


def _inverse(scale: Floats, left: Floats, exponent: Floats) -> Floats:
    """(scale / left)^(1 / exponent) where `left` is positive, else nan."""
    positive = left > 0
    with np.errstate(over="ignore"):  # what little is left may ask for more than there are numbers: infinitely many
        return np.where(positive, (scale / np.where(positive, left, 1.0)) ** (1 / exponent), np.nan)
