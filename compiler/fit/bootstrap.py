"""Bootstrap of approach 3: the fit of every draw of the runs, with replacement, each at its own optimum.

A draw counts each run zero or more times, so that its objective is the whole fit's with other weights. All draws start at the
fit of all runs and are solved together (`approach3.follow`).
"""

from collections.abc import Callable

import numpy as np

from trainwright.compiler.fit.approach3 import Floats, Problem, follow

ENTRIES = 100_000  # runs times draws that are solved at once: what stays in a core's cache


def bootstrap(
    problem: Problem, theta: Floats, draws: int, seed: int, progress: Callable[[int], object] = lambda done: None
) -> Floats:
    """The points of `draws` draws, shape (draws, 5). `progress` is told how many more are done."""
    generator = np.random.default_rng(seed)
    runs = len(problem.x)
    solved = []
    at_once = max(1, ENTRIES // runs)
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        weights = draw_weights(generator, runs, count)
        points, _ = follow(problem, np.repeat(theta[None], count, axis=0), weights)
        solved.append(points)
        progress(count)
    return np.concatenate(solved) if solved else np.empty((0, 5))


def draw_weights(generator: np.random.Generator, runs: int, draws: int) -> Floats:
    """How often each run is in each draw, shape (draws, runs)."""
    counts = [np.bincount(generator.integers(0, runs, runs), minlength=runs) for _ in range(draws)]
    return np.array(counts, dtype=np.float64)
