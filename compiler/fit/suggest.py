"""Which further runs narrow a law most: a sweep under a FLOPs budget, by the Gauss-Newton information of the fit.

A run of N and D informs on theta by J^T J / noise^2, J the slopes of ln L there. The sweep minimises the sum of the relative
variances of ln N and ln L at the target budget (V-optimal): greedily first, then by exchanging runs until none helps
(Fedorov 1972). A weak prior keeps the information of few runs regular; runs that are too few to fit, or that fit no power
law, take the constants of the default law in place of their own.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.facts import find_law_facts
from trainwright.compiler.fit.approach3 import Floats, Problem
from trainwright.compiler.fit.optimum import best_at
from trainwright.compiler.fit.runs import Runs

DEFAULT_LAW = "epoch2024"
MOST_RUNS = 12
STEP = 2**0.5  # between the sizes, and the tokens, of candidates
BEYOND = 2.0  # times outside the runs' sizes and tokens, where the law is still taken to hold
LEAST_SPAN = 32.0  # of the candidates' sizes and tokens
RATIOS = (1.0, 1000.0)  # tokens a parameter
LARGEST_SHARE = 1 / 3  # of the budget, and of the target, that one run may take: it is a sweep of small runs
NOISE = (
    0.006  # sd of ln L from run to run: about the fit of Hoffmann et al.'s 240 runs, where too few are there to see it
)
LEAST_NOISE = 1e-3
# Before any run: a factor e of the terms' sizes, and exponents between the 0.1 and 0.6 that published laws have.
PRIOR_SD = np.array([1.0, 1.0, 0.5, 0.15, 0.15])
NEGLIGIBLE = 0.01  # a run without which the criterion rises by less is left out
EXCHANGES = 20
STARTS = (1, 4, 16)  # greedy sweeps of the budget over these


@dataclass(frozen=True)
class Sweep:
    """Runs to make, shape (m,), and the standard deviations of ln N and ln L at `target` that are expected before and after."""

    params: Floats
    tokens: Floats
    budget: float  # FLOPs
    target: float  # FLOPs
    size_sd: tuple[float, float]
    loss_sd: tuple[float, float]
    law: str  # whose constants the slopes are taken at

    @property
    def flops(self) -> Floats:
        """6 N D of each run."""
        return 6 * self.params * self.tokens


@dataclass(frozen=True)
class _Design:
    """Slopes over noise: of the runs there are as information (5, 5), of candidates (c, 5), and of the two targets (2, 5)."""

    information: Floats
    candidates: Floats
    costs: Floats
    targets: Floats

    def variances(self, chosen: list[int]) -> Floats:
        """Of the two targets with these candidates added, shape (2,)."""
        rows = self.candidates[chosen]
        return _quadratic(_inverse(self.information + rows.T @ rows), self.targets)

    def criterion(self, chosen: list[int], before: Floats) -> float:
        """The sum of the variances, each over what it was."""
        return float((self.variances(chosen) / before).sum())

    def after_adding(self, chosen: list[int], before: Floats) -> Floats:
        """The criterion with each candidate added to `chosen`, shape (c,): Sherman and Morrison's update."""
        rows = self.candidates[chosen]
        covariance = _inverse(self.information + rows.T @ rows)
        across = self.candidates @ covariance
        gain = (across @ self.targets.T) ** 2 / (1 + (across * self.candidates).sum(axis=1))[:, None]
        left: Floats = ((_quadratic(covariance, self.targets) - gain) / before).sum(axis=1)
        return left


def suggest(runs: Runs, problem: Problem, theta: Floats | None, budget: float, target: float) -> Sweep:
    """The sweep for a budget (FLOPs in all) and a target (FLOPs). theta None: the default law's constants.

    Raises InfeasibleError where the budget pays for no run.
    """
    law = "the fit"
    noise = NOISE
    if theta is None:
        law, theta = DEFAULT_LAW, _default_theta(problem)
    else:
        noise = noise_of(problem, theta)
    params, tokens = _candidates(runs, min(budget, target))
    design = _Design(
        information=_information(problem, theta, noise),
        candidates=_slopes(problem, theta, params, tokens) / noise,
        costs=6 * params * tokens,
        targets=_target_slopes(problem, theta, target),
    )
    before = design.variances([])
    # A start that spends less leaves room for exchanges that one which spends all has not.
    found = [_exchange(design, _greedy(design, budget / part, before), budget, before) for part in STARTS]
    chosen = _prune(design, min(found, key=lambda indices: design.criterion(indices, before)), before)
    after = design.variances(chosen)
    chosen.sort(key=lambda index: (design.costs[index], params[index]))
    sds = np.sqrt(np.stack([before, after], axis=1))
    return Sweep(params[chosen], tokens[chosen], budget, target, (sds[0, 0], sds[0, 1]), (sds[1, 0], sds[1, 1]), law)


def noise_of(problem: Problem, theta: Floats) -> float:
    """sd of ln L around the fit, from the median, which runs far off do not move."""
    residual = np.abs(problem.log_loss - problem.shares(theta[None])[0][0])
    return max(LEAST_NOISE, 1.4826 * float(np.median(residual)))


def expected_sd(problem: Problem, theta: Floats, noise: float, target: float) -> Floats:
    """Of ln N and ln L at the target, shape (2,), by the information of the runs and the prior."""
    covariance = _inverse(_information(problem, theta, noise))
    return np.asarray(np.sqrt(_quadratic(covariance, _target_slopes(problem, theta, target))))


def _default_theta(problem: Problem) -> Floats:
    law = find_law_facts(DEFAULT_LAW).constants
    a, b = np.log(law["A"]) - law["alpha"] * problem.mean_x, np.log(law["B"]) - law["beta"] * problem.mean_y
    return np.array([a, b, np.log(law["E"]), law["alpha"], law["beta"]])


def _information(problem: Problem, theta: Floats, noise: float) -> Floats:
    slopes = _slopes(problem, theta, np.exp(problem.x + problem.mean_x), np.exp(problem.y + problem.mean_y)) / noise
    information: Floats = slopes.T @ slopes + np.diag(PRIOR_SD**-2.0)
    return information


def _slopes(problem: Problem, theta: Floats, params: Floats, tokens: Floats) -> Floats:
    """d ln L / d theta, shape (runs, 5)."""
    x, y = np.log(params) - problem.mean_x, np.log(tokens) - problem.mean_y
    there = Problem(x, y, np.zeros_like(x), problem.mean_x, problem.mean_y)
    p, q, r = there.shares(theta[None])[1][:, 0]
    return np.stack([p, q, r, -x * p, -y * q], axis=1)


def _target_slopes(problem: Problem, theta: Floats, target: float) -> Floats:
    """d ln N / d theta and d ln L / d theta at the best size for a budget, shape (2, 5).

    From ln N = (ln(alpha A) - ln(beta B) + beta ln(C / 6)) / (alpha + beta); the best size does not move the loss.
    """
    best = best_at(problem.constants(theta), target)
    alpha, beta = theta[3:]
    x, y = np.log(best["params"]) - problem.mean_x, np.log(best["tokens"]) - problem.mean_y
    size = np.array([1.0, -1.0, 0.0, 1 / alpha - x, y - 1 / beta]) / (alpha + beta)
    return np.stack([size, _slopes(problem, theta, best["params"][None], best["tokens"][None])[0]])


def _candidates(runs: Runs, limit: float) -> tuple[Floats, Floats]:
    """(params, tokens) of every run that may be suggested, two significant digits each.

    `limit`: FLOPs of which a run takes LARGEST_SHARE at most. Raises InfeasibleError where that is none.
    """
    params, tokens = (axis.ravel() for axis in np.meshgrid(_axis(runs.params), _axis(runs.tokens), indexing="ij"))
    ratio = tokens / params
    wide = (min(RATIOS[0], (runs.tokens / runs.params).min()), max(RATIOS[1], (runs.tokens / runs.params).max()))
    params, tokens = (axis[(ratio >= wide[0]) & (ratio <= wide[1])] for axis in (params, tokens))
    costs = 6 * params * tokens
    pays = costs <= LARGEST_SHARE * limit
    if not pays.any():
        least = int(np.argmin(costs))
        size, length = f"{params[least]:.3g}", f"{tokens[least]:.3g}"
        raise InfeasibleError(
            f"{limit:.4g} FLOPs pay for no sweep: the smallest run near the file's, {size} params on {length} tokens, takes "
            f"6 x {size} x {length} = {costs[least]:.3g} FLOPs, and a run may take a third of --suggest and of --target; "
            f"{costs[least] / LARGEST_SHARE:.2g} FLOPs are enough"
        )
    known = set(zip(runs.params, runs.tokens, strict=True))
    pays &= np.array([pair not in known for pair in zip(params, tokens, strict=True)])
    return params[pays], tokens[pays]


def _axis(values: Floats) -> Floats:
    low, high = float(values.min()) / BEYOND, float(values.max()) * BEYOND
    widen = max(1.0, LEAST_SPAN / (high / low)) ** 0.5
    count = int(np.log(high / low * widen**2) / np.log(STEP)) + 1
    steps = low / widen * STEP ** np.arange(count)
    return np.array(sorted({float(f"{step:.2g}") for step in steps}))


def _inverse(matrix: Floats) -> Floats:
    return np.asarray(np.linalg.inv(matrix), dtype=np.float64)


def _quadratic(covariance: Floats, rows: Floats) -> Floats:
    return np.asarray(np.einsum("ti,ij,tj->t", rows, covariance, rows))


def _greedy(design: _Design, budget: float, before: Floats) -> list[int]:
    """Up to MOST_RUNS candidates, each the best addition that leaves the cheapest run affordable for the places left."""
    chosen: list[int] = []
    left, cheapest = budget, float(design.costs.min())
    for place in range(MOST_RUNS):
        values = design.after_adding(chosen, before)
        later = min(MOST_RUNS - place - 1, int(left / cheapest) - 1)
        values[design.costs > left - cheapest * later] = np.inf
        values[chosen] = np.inf
        best = int(np.argmin(values))
        if not np.isfinite(values[best]):
            break
        chosen.append(best)
        left -= float(design.costs[best])
    return chosen


def _exchange(design: _Design, chosen: list[int], budget: float, before: Floats) -> list[int]:
    """Swap one run at a time for the candidate that lowers the criterion most, until none does."""
    value = design.criterion(chosen, before)
    for _ in range(EXCHANGES):
        start = value
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            values = design.after_adding(others, before)
            values[design.costs > budget - design.costs[others].sum()] = np.inf
            values[others] = np.inf
            best = int(np.argmin(values))
            if values[best] < value * (1 - 1e-9):
                chosen, value = [*others, best], float(values[best])
        if value > start * (1 - 1e-6):
            break
    return chosen


def _prune(design: _Design, chosen: list[int], before: Floats) -> list[int]:
    """Without the runs that hardly matter, the least useful first."""
    while len(chosen) > 1:
        value = design.criterion(chosen, before)
        without = [design.criterion([other for other in chosen if other != one], before) for one in chosen]
        least = int(np.argmin(without))
        if without[least] > value * (1 + NEGLIGIBLE):
            break
        chosen = chosen[:least] + chosen[least + 1 :]
    return chosen
