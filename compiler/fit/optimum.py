"""What fitted constants say of a budget, by the law that they make. Constants are numbers, or columns of draws."""

from collections.abc import Mapping

import numpy as np

from trainwright.compiler.facts import make_law_facts
from trainwright.compiler.laws.additive import AdditiveLaw
from trainwright.compiler.laws.law import Floats, Number

# What a law of a user's own runs is, whatever its constants, and whatever its N counts.
FORM = {"form": "additive", "flops": "6 N D"}
_FACTS = make_law_facts("fit", {**FORM, "counts": "", "source": "", "constants": {}}, {})


def law_at(constants: Mapping[str, Number]) -> AdditiveLaw:
    """The law with these constants; nan where an exponent is not above 0, and the law has no optimum."""
    falling = (np.asarray(constants["alpha"]) > 0) & (np.asarray(constants["beta"]) > 0)
    return AdditiveLaw(_FACTS, **{name: np.where(falling, value, np.nan) for name, value in constants.items()})


def size_exponent(constants: Mapping[str, Number]) -> Floats:
    """a of N = G (C / 6)^a."""
    return np.asarray(constants["beta"] / (constants["alpha"] + constants["beta"]))


def best_at(constants: Mapping[str, Number], flops: float) -> dict[str, Floats]:
    """params, tokens, ratio (tokens a parameter) and loss at the optimum; nan, or infinite, where there is none."""
    law = law_at(constants)
    with np.errstate(all="ignore"):  # exponents near 0 ask for more parameters than there are numbers
        params, tokens = law.frontier(flops)
        return {"params": params, "tokens": tokens, "ratio": tokens / params, "loss": law.loss(params, tokens)}
