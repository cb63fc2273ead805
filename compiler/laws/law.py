"""What every scaling law answers: the best size and tokens for its own compute, and, where it has one, the loss.

Each law counts parameters, compute and loss in its own way (`facts.LawFacts`), and was fitted on its own range: figures of two
laws compare only where those agree, losses never. Arrays in, arrays out; constants may be arrays too, one value a bootstrap draw.
"""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from trainwright.compiler.facts import LawFacts

Floats = NDArray[np.float64]
Number = Floats | float

# Frontiers bend (Hoffmann et al. 2022, appendix E): far above the largest fitted compute the sizes come out too large.
FAR_COMPUTE = 30


class Law(ABC):
    """A scaling law. `facts.counts` says what its N is, `facts.flops` what its C is."""

    facts: LawFacts
    has_loss = True  # loss() may be asked
    minimises = True  # its optimum is the least loss at fixed compute; else frontier() is what was fitted

    @abstractmethod
    def frontier(self, flops: Number) -> tuple[Floats, Floats]:
        """The best (N, D) for a compute in the law's own count."""

    @abstractmethod
    def tokens_for(self, parameters: Number) -> Floats:
        """D for which N is the best size."""

    @abstractmethod
    def parameters_for(self, tokens: Number) -> Floats:
        """N for which D are the best tokens."""

    def loss(self, parameters: Number, tokens: Number) -> Floats:
        """L(N, D) in `facts.loss_unit`. Raises ValueError for a law without a loss, as the next three do."""
        raise ValueError(f"{self.facts.name} states no loss")

    def tokens_for_loss(self, loss: Number, parameters: Number) -> Floats:
        """D with which N parameters reach a loss; nan where none do."""
        raise ValueError(f"{self.facts.name} states no loss")

    def parameters_for_loss(self, loss: Number, tokens: Number) -> Floats:
        """N that reach a loss with D tokens; nan where none do."""
        raise ValueError(f"{self.facts.name} states no loss")

    def least_loss(self) -> float:
        """The loss that no run goes below."""
        raise ValueError(f"{self.facts.name} states no loss")

    def draws(self) -> "Law | None":
        """The law with constants of shape (n,), one a bootstrap draw of the runs that it was fitted on; None without draws."""
        return None

    def extrapolations(self, parameters: float, tokens: float, flops: float) -> list[str]:
        """A warning for each of N, D, D / N and C outside what the law was fitted on."""
        facts = self.facts
        warnings = [
            f"{facts.name} was fitted on {low:.3g} to {high:.3g} {name}; {value:.3g} is outside: what it says there is a guess"
            for name, value, (low, high) in (
                (
                    "FLOPs a token" if facts.counts == "flops" else "parameters",
                    float(parameters),
                    facts.fitted_parameters,
                ),
                ("tokens", float(tokens), facts.fitted_tokens),
            )
            if not low <= value <= high
        ]
        ratio, (fewest, most) = tokens / parameters, facts.fitted_tokens_per_parameter
        if facts.counts != "flops" and not fewest <= ratio <= most:
            span = f"{fewest:g} to {most:g}" if fewest else f"at most {most:g}"
            warnings.append(f"{facts.name} was fitted on {span} tokens a parameter; here are {ratio:.4g}")
        if flops > FAR_COMPUTE * facts.fitted_flops[1]:
            warnings.append(
                f"{facts.name} was fitted up to {facts.fitted_flops[1]:.3g} FLOPs; {flops:.3g} are more than {FAR_COMPUTE} times"
                " as many, where frontiers bend towards smaller sizes (Hoffmann et al. 2022, appendix E)"
            )
        return warnings
