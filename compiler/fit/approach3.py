"""Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556): L(N, D) = E + A / N^alpha + B / D^beta at its global optimum.

The objective is theirs, the sum of Huber_0.001(ln L(N, D) - ln loss) over the runs. It is about 1e-3 in size and flat along a
ridge, where general optimizers stop early (Besiroglu et al. 2024, arXiv 2404.10102). Here A, B and E, linear once the
exponents are given, come from non-negative least squares on a grid of exponents; the best of them start a damped Newton
method, in batches, on a threshold that shrinks to 0.001.

A point is theta = (a, b, e, alpha, beta), ln L = ln(exp(a - alpha x) + exp(b - beta y) + exp(e)), with x and y the logarithms
of N and D less their means: without the shift, a and alpha are all but one parameter. Arrays of points have shape (k, 5), of
weights (k, n) for n runs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DELTA = 1e-3  # Hoffmann et al. 2022, section 3.3
CONTINUATION = (0.1, 0.01, DELTA)  # from almost least squares to almost least absolute deviations
GRID = np.linspace(0.05, 1.05, 11)  # exponents: published ones of losses in text lie between 0.1 and 0.8
STARTS = 12  # of the grid's 121
MOST_STEPS = 200
# A point stays inside: beyond, a term has left the data (E below 1e-7 of the losses, exponents of a step or of nothing).
LEAST_E = 1e-7  # of the lowest loss
EXPONENTS = (-0.5, 4.0)
MOST_CHANGE = np.array([2.0, 2.0, 2.0, 0.3, 0.3])  # of theta in a step
RIDGE = 1e-14  # of the trace
CONVERGED = 1e-15  # decrease that the quadratic model still promises, of the objective


@dataclass(frozen=True)
class Problem:
    """Runs in logarithms, shape (n,): of the size and the tokens about their means, and of the loss."""

    x: Floats
    y: Floats
    log_loss: Floats
    mean_x: float
    mean_y: float

    @classmethod
    def of(cls, params: Floats, tokens: Floats, loss: Floats) -> "Problem":
        """From the runs themselves."""
        x, y = np.log(params), np.log(tokens)
        return cls(x - x.mean(), y - y.mean(), np.log(loss), float(x.mean()), float(y.mean()))

    @property
    def least_e(self) -> float:
        """The bound of e = ln E."""
        return float(self.log_loss.min() + np.log(LEAST_E))

    def constants(self, theta: Floats) -> dict[str, Floats]:
        """A, B, E, alpha and beta of points of shape (..., 5)."""
        a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
        return {
            "A": np.exp(a + alpha * self.mean_x),
            "B": np.exp(b + beta * self.mean_y),
            "E": np.exp(e),
            "alpha": alpha,
            "beta": beta,
        }

    def shares(self, theta: Floats) -> tuple[Floats, Floats]:
        """(ln L, its three terms as shares of L) of points (k, 5): shapes (k, n) and (3, k, n)."""
        a, b, e, alpha, beta = (column[:, None] for column in theta.T)
        logs = np.stack(np.broadcast_arrays(a - alpha * self.x, b - beta * self.y, e))
        most = logs.max(axis=0)
        terms = np.exp(logs - most)
        total = terms.sum(axis=0)
        return most + np.log(total), terms / total


def fit(problem: Problem) -> tuple[Floats, float]:
    """(theta, objective) of the global optimum."""
    weights = np.ones((STARTS, len(problem.x)))
    theta, values = follow(problem, _grid_starts(problem), weights)
    best = int(np.argmin(values))
    return theta[best], float(values[best])


def follow(problem: Problem, theta: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """(points, objectives) from starts (k, 5): the minimum at each threshold starts the next, narrower one."""
    for delta in CONTINUATION[:-1]:
        theta, _ = minimise(problem, theta, weights, delta)
    return minimise(problem, theta, weights, CONTINUATION[-1])


def minimise(problem: Problem, theta: Floats, weights: Floats, delta: float) -> tuple[Floats, Floats]:
    """(points, objectives): the local minimum of each weighted objective from its start; shapes (k, 5) and (k,)."""
    theta = theta.copy()
    values = _objective(problem, theta, weights, delta)
    damping = np.full(len(theta), 1e-3)
    left = np.arange(len(theta))
    for _ in range(MOST_STEPS):
        gradient, hessian, metric = _derivatives(problem, theta[left], weights[left], delta)
        step, promised = _newton_step(gradient, hessian, metric, damping[left])
        tried = _bounded(problem, theta[left] + step)
        value = _objective(problem, tried, weights[left], delta)
        better = value <= values[left]
        theta[left[better]], values[left[better]] = tried[better], value[better]
        damping[left] = np.where(better, damping[left] / 10, damping[left] * 10)
        done = (promised <= CONVERGED * values[left] + 1e-300) | (damping[left] > 1e12)
        left = left[~done]
        if not len(left):
            break
    return theta, values


def _bounded(problem: Problem, theta: Floats) -> Floats:
    theta[:, 2] = np.maximum(theta[:, 2], problem.least_e)
    theta[:, 3:] = np.clip(theta[:, 3:], *EXPONENTS)
    return theta


def _objective(problem: Problem, theta: Floats, weights: Floats, delta: float) -> Floats:
    size = np.abs(problem.shares(theta)[0] - problem.log_loss)
    inside = np.minimum(size, delta)
    return np.asarray((weights * inside * (size - inside / 2)).sum(axis=1))


def _derivatives(problem: Problem, theta: Floats, weights: Floats, delta: float) -> tuple[Floats, Floats, Floats]:
    """Gradient (k, 5), Hessian (k, 5, 5), and the positive Hessian of reweighted least squares (k, 5, 5) to damp by."""
    log_loss, (p, q, r) = problem.shares(theta)
    residual = log_loss - problem.log_loss
    size = np.abs(residual)
    slope = weights * np.clip(residual, -delta, delta)
    inner = weights * (size <= delta)
    # d ln L / d theta = (p, q, r, -x p, -y q): each term's share, times minus its logarithm's slope.
    jacobian = np.stack([p, q, r, -problem.x * p, -problem.y * q], axis=2)
    reweighted = weights * np.minimum(1.0, delta / np.maximum(size, delta))
    columns = jacobian.transpose(0, 2, 1)
    gradient = np.matmul(columns, slope[:, :, None])[:, :, 0]
    hessian = np.matmul(columns * (inner - slope)[:, None, :], jacobian)
    metric = np.matmul(columns * reweighted[:, None, :], jacobian)
    # Of runs that say nothing on a constant, its row is 0.
    metric += (RIDGE * np.einsum("kii->k", metric))[:, None, None] * np.eye(5)
    # The second derivatives of ln L are those of each term's share, less the product of slopes already taken off.
    for (one, other), power in _CURVATURES:
        share = (p, q, r)[power[0]] * problem.x ** power[1] * problem.y ** power[2]
        hessian[:, one, other] += (-1.0) ** (power[1] + power[2]) * (slope * share).sum(axis=1)
    return gradient, hessian, metric


# Entry of the Hessian -> (term, power of x, power of y): d2 term / d theta_one d theta_other = term (-x)^i (-y)^j.
_CURVATURES = (
    ((0, 0), (0, 0, 0)),
    ((0, 3), (0, 1, 0)),
    ((3, 0), (0, 1, 0)),
    ((3, 3), (0, 2, 0)),
    ((1, 1), (1, 0, 0)),
    ((1, 4), (1, 0, 1)),
    ((4, 1), (1, 0, 1)),
    ((4, 4), (1, 0, 2)),
    ((2, 2), (2, 0, 0)),
)


def _newton_step(gradient: Floats, hessian: Floats, metric: Floats, damping: Floats) -> tuple[Floats, Floats]:
    """(step, decrease that it promises), shapes (k, 5) and (k,)."""
    step = -_solve(hessian + damping[:, None, None] * metric, gradient)
    promised = -(step * gradient).sum(axis=1)
    # Uphill: the Hessian is indefinite there; the reweighted one never is.
    uphill = promised < 0
    if uphill.any():
        step[uphill] = -_solve(metric[uphill], gradient[uphill])
        promised[uphill] = -(step[uphill] * gradient[uphill]).sum(axis=1)
    shrink = np.minimum(1.0, (MOST_CHANGE / np.maximum(np.abs(step), 1e-300)).min(axis=1))
    return step * shrink[:, None], promised


def _solve(matrices: Floats, right: Floats) -> Floats:
    """Shapes (k, m, m) and (k, m). Of runs that do not tell two constants apart, the shortest solution."""
    try:
        return np.asarray(np.linalg.solve(matrices, right[:, :, None])[:, :, 0])
    except np.linalg.LinAlgError:
        return np.asarray((np.linalg.pinv(matrices, hermitian=True) @ right[:, :, None])[:, :, 0])


def _grid_starts(problem: Problem) -> Floats:
    """The STARTS best points of the grid of exponents, shape (STARTS, 5), by relative squared error."""
    loss = np.exp(problem.log_loss)
    alpha, beta = (axis.ravel() for axis in np.meshgrid(GRID, GRID, indexing="ij"))
    columns = np.stack(
        [
            np.exp(-alpha[:, None] * problem.x) / loss,
            np.exp(-beta[:, None] * problem.y) / loss,
            np.broadcast_to(1 / loss, (len(alpha), len(loss))),
        ],
        axis=1,
    )
    terms, error = _non_negative(columns)
    order = np.argsort(error, kind="stable")[:STARTS]
    logs = np.log(np.maximum(terms[order], 1e-3 * loss.min()))  # a term that is left out starts small
    return np.column_stack([logs, alpha[order], beta[order]])


def _non_negative(columns: Floats) -> tuple[Floats, Floats]:
    """Least squares of 1 by three columns with coefficients >= 0, exactly: the best of the seven subsets that comes out
    non-negative. columns (k, 3, n) -> coefficients (k, 3), squared errors (k,)."""
    normal = np.matmul(columns, columns.transpose(0, 2, 1))
    right = columns.sum(axis=2)
    best, least = np.zeros((len(columns), 3)), np.full(len(columns), np.inf)
    for subset in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        part = normal[:, subset][:, :, subset]
        ridge = 1e-12 * np.einsum("kii->k", part)[:, None, None] * np.eye(len(subset))
        found = _solve(part + ridge, right[:, subset])
        full = np.zeros_like(best)
        full[:, subset] = found
        error = ((1 - np.einsum("ki,kin->kn", full, columns)) ** 2).sum(axis=1)
        take = (found >= 0).all(axis=1) & (error < least)
        best[take], least[take] = full[take], error[take]
    return best, least
