"""Runs -> Fit: constants, their bootstrap, what they say at a budget, and whether they may be extrapolated at all."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.fit.approach2 import Approach2, fit_minima
from trainwright.compiler.fit.approach3 import Floats, Problem, fit
from trainwright.compiler.fit.bootstrap import bootstrap
from trainwright.compiler.fit.consistency import check_units
from trainwright.compiler.fit.identify import list_refusals
from trainwright.compiler.fit.optimum import best_at, size_exponent
from trainwright.compiler.fit.runs import Runs

CONSTANTS = ("A", "B", "E", "alpha", "beta")
EXTRAPOLATIONS = (
    1.0,
    10.0,
    30.0,
)  # times the largest run's FLOPs; Hoffmann et al. 2022, appendix E: beyond, the frontier bends
MOST_MEDIAN_ERROR = 0.02  # of ln L; that of Hoffmann et al.'s 240 runs is 0.0032
PERCENTILES = (10.0, 90.0, 2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A value of the fit to all runs, and the intervals of the bootstrap's percentiles."""

    value: float
    interval_80: tuple[float, float]
    interval_95: tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """`refusals` is empty where the law may be extrapolated. `theta` and `draws` are points of approach 3: (5,), (draws, 5)."""

    runs: Runs
    problem: Problem
    theta: Floats
    draws: Floats
    objective: float
    approach2: Approach2
    refusals: tuple[str, ...]

    @property
    def constants(self) -> dict[str, float]:
        """A, B, E, alpha, beta."""
        return {name: float(value) for name, value in self.problem.constants(self.theta).items()}

    def estimates(self) -> dict[str, Estimate]:
        """The constants, and a = beta / (alpha + beta), the exponent of N over C."""
        return self._estimates(lambda constants: {**constants, "a": size_exponent(constants)})

    def at(self, flops: float) -> dict[str, Estimate]:
        """Best params and tokens for a budget, their ratio, and the loss there."""
        return self._estimates(lambda constants: best_at(constants, flops))

    def residuals(self) -> Floats:
        """ln loss less ln of the law, a run each."""
        return np.asarray(self.problem.log_loss - self.problem.shares(self.theta[None])[0][0])

    def budgets(self) -> tuple[float, ...]:
        """FLOPs at which the table reports: inside the runs only where extrapolation is refused."""
        largest = float(self.runs.model_flops.max())
        return (largest,) if self.refusals else tuple(times * largest for times in EXTRAPOLATIONS)

    def warnings(self, budgets: Iterable[float]) -> list[str]:
        """What to mind in the numbers at these FLOPs."""
        largest, error = float(self.runs.model_flops.max()), float(np.median(np.abs(self.residuals())))
        most = EXTRAPOLATIONS[-1]
        found = [
            f"{flops:.3g} FLOPs are {flops / largest:.3g} x the largest run: beyond {most:g} x the frontier bends to smaller "
            "models (Hoffmann et al. 2022, appendix E)"
            for flops in budgets
            if flops > most * largest * (1 + 1e-9)
        ]
        if error > MOST_MEDIAN_ERROR:
            found.append(
                f"half of the runs are off the law by more than {100 * error:.2g} %: runs of several tokenizers, corpora "
                "or schedules that end early lie on no one law"
            )
        return found

    def _estimates(self, of: Callable[[Mapping[str, Floats]], Mapping[str, Floats]]) -> dict[str, Estimate]:
        values, draws = of(self.problem.constants(self.theta)), of(self.problem.constants(self.draws))
        return {name: estimate(float(value), draws[name]) for name, value in values.items()}


def fit_runs(runs: Runs, draws: int, seed: int, progress: Callable[[int], object] = lambda done: None) -> Fit:
    """Both approaches. Raises RunsError where losses are in several units."""
    problem = Problem.of(runs.params, runs.tokens, runs.loss)
    theta, objective = fit(problem)
    check_units(runs, problem, theta)
    points = bootstrap(problem, theta, draws, seed, progress)
    return Fit(
        runs=runs,
        problem=problem,
        theta=theta,
        draws=points,
        objective=objective,
        approach2=fit_minima(runs, draws, seed),
        refusals=list_refusals(runs, problem, theta, points),
    )


def estimate(value: float, draws: Floats) -> Estimate:
    """With percentiles of the draws that are numbers."""
    there = draws[np.isfinite(draws)]
    bounds = np.percentile(there, PERCENTILES) if len(there) else np.full(4, np.nan)
    low_80, high_80, low_95, high_95 = (float(bound) for bound in bounds)
    return Estimate(value, (low_80, high_80), (low_95, high_95))
