"""Searches over a law's sizes and tokens where there is no closed form: on grids of logarithms, column by column."""

import math
from collections.abc import Callable

import numpy as np

from trainwright.compiler.laws.law import Floats, Law, Number

STEP = 1e-3  # of a logarithm: half the distance of a central difference
SIZES = np.geomspace(1e3, 1e18, 3001)  # parameters; neighbours are 1.2 % apart
TOKENS = np.geomspace(1e3, 1e22, 3801)


def least(places: Floats, values: Floats) -> Floats:
    """Where each column of `values` is least; nan without a number.

    places (n,), evenly spaced in logarithms; values (n, k), infinite or nan where there is none. The parabola through the least
    row and its neighbours says where between them.
    """
    values = np.where(np.isfinite(values), values, np.inf)
    lowest = np.argmin(values, axis=0)
    columns = np.arange(values.shape[1])
    inner = np.clip(lowest, 1, len(values) - 2)
    parts = [values[inner + shift, columns] for shift in (-1, 0, 1)]
    whole = np.isfinite(parts[0]) & np.isfinite(parts[2]) & (inner == lowest)
    left, middle, right = (np.where(whole, part, 0.0) for part in parts)
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    found = places[lowest] * (places[1] / places[0]) ** np.clip(shift, -1, 1)
    return np.asarray(np.where(np.isfinite(values[lowest, columns]), found, np.nan))


def root(places: Floats, rising: Floats) -> Floats:
    """Where each rising column is 0, interpolated in the logarithm of the place; an end where it is 0 nowhere, nan without a
    number. places (n,), rising (n, k)."""
    found = []
    for column in rising.T:
        known = np.isfinite(column)
        found.append(math.exp(np.interp(0.0, column[known], np.log(places[known]))) if known.any() else math.nan)
    return np.array(found)


def least_at_compute(law: Law, flops: Number) -> tuple[Floats, Floats]:
    """(N, D) of the least loss at C = 6 N D."""
    compute = np.atleast_1d(np.asarray(flops, dtype=np.float64))
    tokens = compute / 6 / SIZES[:, None]
    parameters = least(SIZES, np.where(tokens >= 1, law.loss(SIZES[:, None], np.maximum(tokens, 1.0)), np.inf))
    return _like(flops, parameters), _like(flops, compute / 6 / parameters)


def balanced_tokens(law: Law, parameters: Number, inference_tokens: float = 0.0, elasticity: Number = 1.0) -> Floats:
    """D for which N is the best of all sizes that reach the same loss, inference counted (`balance`)."""
    columns = np.atleast_1d(np.asarray(parameters, dtype=np.float64))[None, :]
    return _like(parameters, root(TOKENS, balance(law, columns, TOKENS[:, None], inference_tokens, elasticity)))


def balanced_parameters(law: Law, tokens: Number) -> Floats:
    """N that is the best of all sizes that reach the same loss when it is trained on D (`balance`)."""
    columns = np.atleast_1d(np.asarray(tokens, dtype=np.float64))[None, :]
    return _like(tokens, root(SIZES, -balance(law, SIZES[:, None], columns)))


def balance(
    law: Law, parameters: Floats, tokens: Floats, inference_tokens: float = 0.0, elasticity: Number = 1.0
) -> Floats:
    """ln of the sides of N dL/dN / (D dL/dD) = e (1 + D_inference / (3 D)): 0 where no other size reaches the loss for less.

    First-order condition of min F(N) (D + D_inference / 3) at fixed L(N, D), F the FLOPs of training a token and e its
    `elasticity`, d ln F / d ln N. With F = 6 N it is Sardana and Frankle's (2023, arXiv 2401.00448).
    """

    def slope(change: Callable[[float], Floats]) -> Floats:
        return change(-STEP) - change(STEP)

    by_size = slope(lambda step: law.loss(parameters * math.exp(step), tokens))
    by_tokens = slope(lambda step: law.loss(parameters, tokens * math.exp(step)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(by_size / by_tokens / elasticity) - np.log1p(inference_tokens / (3 * tokens)))


def _like(given: Number, found: Floats) -> Floats:
    """A scalar for a scalar, unless the law's constants are columns."""
    return np.asarray(found[0]) if np.ndim(given) == 0 and found.shape == (1,) else found
