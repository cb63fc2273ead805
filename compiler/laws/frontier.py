"""Laws that state the best size and tokens for a compute as powers of it: N = k_N C^a, D = k_D C^b."""

import numpy as np

from trainwright.compiler.facts import LawFacts
from trainwright.compiler.laws.law import Floats, Law, Number


class FrontierLaw(Law):
    """Constants k_N, a, k_D and b of the facts."""

    has_loss = False
    minimises = False

    def __init__(self, facts: LawFacts) -> None:
        self.facts = facts
        self.k_N, self.a, self.k_D, self.b = (facts.constants[name] for name in ("k_N", "a", "k_D", "b"))

    def frontier(self, flops: Number) -> tuple[Floats, Floats]:
        """The best (N, D) for a compute in the law's own count."""
        compute = np.asarray(flops, dtype=np.float64)
        return np.asarray(self.k_N * compute**self.a), np.asarray(self.k_D * compute**self.b)

    def tokens_for(self, parameters: Number) -> Floats:
        """D at the compute for which N is the best size."""
        compute = (np.asarray(parameters, dtype=np.float64) / self.k_N) ** (1 / self.a)
        return np.asarray(self.k_D * compute**self.b)

    def parameters_for(self, tokens: Number) -> Floats:
        """N at the compute for which D are the best tokens."""
        compute = (np.asarray(tokens, dtype=np.float64) / self.k_D) ** (1 / self.b)
        return np.asarray(self.k_N * compute**self.a)


class KaplanLaw(FrontierLaw):
    """Kaplan et al. 2020 (arXiv 2001.08361): a frontier in C_min, and a loss of its own.

    The loss is that of a model trained with early stopping (their table 2), not of one trained for a compute, so that its
    least value at fixed compute is not their frontier.
    """

    has_loss = True

    def loss(self, parameters: Number, tokens: Number) -> Floats:
        """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (their equation 1.5)."""
        c = self.facts.constants
        by_size = (c["N_c"] / np.asarray(parameters, dtype=np.float64)) ** (c["alpha_N"] / c["alpha_D"])
        return np.asarray((by_size + c["D_c"] / np.asarray(tokens, dtype=np.float64)) ** c["alpha_D"])

    def tokens_for_loss(self, loss: Number, parameters: Number) -> Floats:
        """D with which N parameters reach a loss; nan where none do."""
        c = self.facts.constants
        by_size = (c["N_c"] / np.asarray(parameters, dtype=np.float64)) ** (c["alpha_N"] / c["alpha_D"])
        left = np.asarray(loss, dtype=np.float64) ** (1 / c["alpha_D"]) - by_size
        return np.where(left > 0, c["D_c"] / np.where(left > 0, left, 1.0), np.nan)

    def parameters_for_loss(self, loss: Number, tokens: Number) -> Floats:
        """N that reach a loss with D tokens; nan where none do."""
        c = self.facts.constants
        left = np.asarray(loss, dtype=np.float64) ** (1 / c["alpha_D"]) - c["D_c"] / np.asarray(
            tokens, dtype=np.float64
        )
        power = np.where(left > 0, left, 1.0) ** (c["alpha_D"] / c["alpha_N"])
        return np.where(left > 0, c["N_c"] / power, np.nan)

    def least_loss(self) -> float:
        """0: the law knows no irreducible loss."""
        return 0.0
