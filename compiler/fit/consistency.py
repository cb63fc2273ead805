"""Whether the losses of a file are in one unit: bits among nats, bytes among tokens, a digit too many.

Runs of one unit lie on one smooth surface over size and tokens; runs in another lie on the same surface times a factor.
"""

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainwright.compiler.errors import RunsError
from trainwright.compiler.fit.approach3 import Floats, Problem, fit
from trainwright.compiler.fit.runs import Runs

Bools = NDArray[np.bool_]

LEAST_FACTOR = 1.35  # between two units: the nearest two, nats and bits, are 1.443 apart
MUCH_BETTER = 4.0  # the law's errors have to shrink so much once the factor is taken out
WRONG = 2.0  # times off the law that all runs give: no seed, schedule or tuning does that
BITS = 1 / math.log(2)
ROUNDS = 20


def check_units(runs: Runs, problem: Problem, theta: Floats) -> None:
    """Raises RunsError where some losses are in another unit than the others, or far from anything the others suggest."""
    residual = problem.log_loss - problem.shares(theta[None])[0][0]
    others = _two_units(problem)
    if others is not None:
        factor, z = others
        corrected = Problem(
            problem.x, problem.y, problem.log_loss - math.log(factor) * z, problem.mean_x, problem.mean_y
        )
        after = corrected.log_loss - corrected.shares(fit(corrected)[0][None])[0][0]
        error = max(np.abs(residual[z]).mean(), np.abs(residual[~z]).mean())
        if np.abs(after).mean() * MUCH_BETTER < error:
            lines = [line for line, other in zip(runs.lines, z, strict=True) if other]
            which, fix = (
                f"{len(lines)} of {len(runs)} losses (lines {_listed(lines)}) are",
                "write all losses in one unit",
            )
            if len(lines) == 1:
                which, fix = f"{runs.loss[z][0]:.4g} is", f"{fix}, or remove the line of a run that diverged"
            raise RunsError(
                f"{runs.file}:{lines[0]}: loss: {which} {factor:.3g} x what the others suggest: with the factor taken out the "
                f"law's mean error falls from {100 * error:.3g} % to {100 * np.abs(after).mean():.2g} %; {_unit(factor)}: {fix}"
            )
    far = np.abs(residual) > math.log(WRONG)
    if far.any():
        raise RunsError(
            "\n".join(
                f"{runs.file}:{runs.lines[index]}: loss: {runs.loss[index]:.4g} is {math.exp(residual[index]):.3g} x the "
                f"{runs.loss[index] / math.exp(residual[index]):.4g} of the law through all runs; another unit, or a run that "
                "diverged: correct it, or remove the line"
                for index in np.flatnonzero(far)[:10]
            )
        )


def _unit(factor: float) -> str:
    if abs(math.log(factor) - math.log(BITS)) < 0.06:
        return "1 / ln 2 = 1.443, bits among nats"
    if abs(math.log(factor) + math.log(BITS)) < 0.06:
        return "ln 2 = 0.693, nats among bits"
    if not 0.6 < factor < 1.7:
        return "losses a token are 2 to 5 x those a byte, and perplexities differ by more"
    return "another unit, or another tokenizer or corpus"


def _listed(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:6]))
    return shown if len(lines) <= 6 else f"{shown}, ..."


def _two_units(problem: Problem) -> tuple[float, Bools] | None:
    """(factor, which runs have it): the best of two parallel surfaces, quadratic in logarithms; the fewer are the others."""
    runs = len(problem.x)
    x, y = (axis / max(axis.std(), 1e-12) for axis in (problem.x, problem.y))
    columns = [np.ones(runs), x, y] + ([x * x, x * y, y * y] if runs >= 15 else [])
    surface = np.stack(columns, axis=1)
    flat = problem.log_loss - surface @ np.linalg.lstsq(surface, problem.log_loss, rcond=None)[0]
    widest = sorted(pairwise(np.sort(flat)), key=lambda pair: pair[0] - pair[1])[:3]
    splits = [0.0, *((low + high) / 2 for low, high in widest)]
    found = [_settle(surface, problem.log_loss, flat > split) for split in splits]
    usable = [
        (error, log_factor, z)
        for error, log_factor, z in found
        if min(z.sum(), (~z).sum()) >= 1 and abs(log_factor) > math.log(LEAST_FACTOR)
    ]
    if not usable:
        return None
    _, log_factor, z = min(usable, key=lambda one: one[0])
    return (math.exp(log_factor), z) if z.sum() <= runs / 2 else (math.exp(-log_factor), ~z)


def _settle(surface: Floats, log_loss: Floats, z: Bools) -> tuple[float, float, Bools]:
    """(squared error, ln factor, which runs have it): a fit, and each run to the nearer surface, in turn."""
    for _ in range(ROUNDS):
        *coefficients, log_factor = np.linalg.lstsq(np.column_stack([surface, z]), log_loss, rcond=None)[0]
        left = log_loss - surface @ np.array(coefficients)
        previous, z = z, np.abs(left - log_factor) < np.abs(left)
        if (z == previous).all():
            return float(((left - log_factor * z) ** 2).sum()), float(log_factor), z
    return math.inf, 0.0, z
