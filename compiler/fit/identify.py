"""Whether runs determine a law that may be extrapolated, each criterion with its numbers.

A fit always returns constants. They mean something beyond the runs only if the runs tell the law's three terms apart: the
irreducible loss is not at its bound, size and tokens vary, and vary apart, and the bootstrap agrees with itself ahead.
"""

import numpy as np

from trainwright.compiler.fit.approach3 import Floats, Problem
from trainwright.compiler.fit.optimum import best_at
from trainwright.compiler.fit.runs import Runs

LEAST_E = 0.01  # of the lowest loss: below, E is at its bound
MOST_DRAWS_AT_BOUND = 0.025  # more, and the 95 % interval reaches the bound
LEAST_SPAN = 3.0  # of params, tokens and tokens a parameter, the largest over the smallest
EXPONENTS = (0.01, 2.0)  # outside, a term is flat or a step over the runs, and no power law
AHEAD = (
    10.0  # times the largest run's FLOPs, where the bands below are read, and at what a sweep aims unless the user says
)
WIDEST_SIZE = 4.0  # 80 % interval of the best size there, high over low
WIDEST_LOSS = 1.1  # of the loss


def list_refusals(runs: Runs, problem: Problem, theta: Floats, draws: Floats) -> tuple[str, ...]:
    """Why the law may not be extrapolated; nothing where it may."""
    constants = problem.constants(theta)
    return (*_spans(runs), *_bounds(runs, constants, problem.constants(draws)), *_bands(runs, problem, draws))


def _spans(runs: Runs) -> list[str]:
    spans = {"params": runs.params, "tokens": runs.tokens, "tokens a parameter": runs.tokens / runs.params}
    return [
        f"{name} span {_times(values.max() / values.min())} ({values.min():.3g} to {values.max():.3g}), and less than "
        f"{LEAST_SPAN:g} x does not tell the terms apart: add runs with {_missing(name)}"
        for name, values in spans.items()
        if values.max() < LEAST_SPAN * values.min()
    ]


def _missing(name: str) -> str:
    if name == "tokens a parameter":
        return "fewer and with more tokens at the same size"
    return f"fewer and with more {name}"


def _bounds(runs: Runs, constants: dict[str, Floats], draws: dict[str, Floats]) -> list[str]:
    found = []
    lowest = LEAST_E * float(runs.loss.min())
    at_bound = float((draws["E"] < lowest).mean())
    if constants["E"] < lowest:
        found.append(
            f"the irreducible loss E = {constants['E']:.3g} sits at its bound 0 (below {LEAST_E:g} x the lowest loss "
            f"{runs.loss.min():.4g}): the runs do not show where the loss levels off; larger runs would"
        )
    elif at_bound > MOST_DRAWS_AT_BOUND:
        found.append(
            f"the irreducible loss E = {constants['E']:.3g} sits at its bound 0 in {100 * at_bound:.1f} % of the bootstrap's "
            f"draws, more than {100 * MOST_DRAWS_AT_BOUND:g} %: its 95 % interval reaches the bound; larger runs would narrow it"
        )
    low, high = EXPONENTS
    for name, term, meaning in (("alpha", "A / N^alpha", "params"), ("beta", "B / D^beta", "tokens")):
        outside = float(((draws[name] < low) | (draws[name] > high)).mean())
        if not low <= constants[name] <= high or outside > MOST_DRAWS_AT_BOUND:
            found.append(
                f"{name} is {constants[name]:.3g}, and {100 * outside:.1f} % of its draws are outside {low:g} to {high:g}: over "
                f"these runs {term} is no power law of {meaning}; add runs that differ in {meaning} alone"
            )
    return found


def _bands(runs: Runs, problem: Problem, draws: Floats) -> list[str]:
    flops = AHEAD * float(runs.model_flops.max())
    ahead = best_at(problem.constants(draws), flops)
    found = []
    for name, noun, widest in (("params", "best size", WIDEST_SIZE), ("loss", "loss", WIDEST_LOSS)):
        there = ahead[name][np.isfinite(ahead[name])]
        if len(there) < 0.9 * len(draws):
            found.append(
                f"{100 * (1 - len(there) / len(draws)):.0f} % of the bootstrap's draws have no {noun} at any budget"
            )
            continue
        low, high = np.percentile(there, (10.0, 90.0))
        if high > widest * low:
            found.append(
                f"at {AHEAD:g} x the largest run ({flops:.3g} FLOPs) the 80 % interval of the {noun} is {low:.4g} to {high:.4g}, "
                f"{_times(high / low)} wide, and more than {widest:g} x says nothing"
            )
    return found


def _times(value: float) -> str:
    return f"{value:.3g} x"
