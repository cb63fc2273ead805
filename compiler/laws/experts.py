"""Mixtures of experts: Ludziejewski et al. 2025 (arXiv 2502.05172), the joint law of active size, tokens and number of experts.

L = a e^delta N^(alpha + gamma ln e) + b e^omega D^(beta + zeta ln e) + c with 1 / e = 1 / (E - 1 + (1 / E_start - 1 / E_max)^-1)
+ 1 / E_max (Clark et al. 2022, arXiv 2202.01169). For a given number of experts E it is an additive law in the active N.
"""

import math

from trainwright.compiler.facts import LawFacts
from trainwright.compiler.laws.additive import AdditiveLaw


class ExpertsLaw(AdditiveLaw):
    """The law at one number of experts, of which a token uses one; 1 is dense."""

    def __init__(self, facts: LawFacts, experts: float = 1.0) -> None:
        c = facts.constants
        e = effective_experts(experts, c["E_start"], c["E_max"])
        super().__init__(
            facts,
            A=c["a"] * e ** c["delta"],
            B=c["b"] * e ** c["omega"],
            E=c["c"],
            alpha=-(c["alpha"] + c["gamma"] * math.log(e)),
            beta=-(c["beta"] + c["zeta"] * math.log(e)),
        )
        self.experts = experts

    def with_experts(self, experts: float) -> "ExpertsLaw":
        """The law at another number of experts."""
        return ExpertsLaw(self.facts, experts)


def effective_experts(experts: float, start: float, most: float) -> float:
    """Clark et al.'s saturating number of experts."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
