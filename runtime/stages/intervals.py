"""95 % intervals of evaluation figures, and of differences between models that were asked the same items."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
CONFIDENCE = 0.95
Z = 1.959963984540054  # quantile of the normal distribution at (1 + CONFIDENCE) / 2
RESAMPLES = 2000  # of the bootstrap: enough for the 2.5 % quantiles to be steady in their second digit
DRAWS_IN_MEMORY = 1_000_000  # at a time


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % interval, from `n` items."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Items:
    """What a figure is made of. Its value is the sum of the items' values over the sum of their weights; where `exponential`,
    e to the power of it (a perplexity from nats and tokens); then times `scale`."""

    weights: Array  # [items]
    strata: Array | None = None  # [items]: a number of the stratum (source) that an item is drawn from
    exponential: bool = False
    scale: float = 1.0

    def transform(self, means: Array) -> Array:
        return self.scale * (np.exp(means) if self.exponential else means)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927): never outside [0, 1], never of width 0."""
    share, slack = successes / n, Z * Z / n
    middle = (share + slack / 2) / (1 + slack)
    half = Z * math.sqrt(share * (1 - share) / n + slack / (4 * n)) / (1 + slack)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(values: Array) -> Figure:
    """The share of items whose value is 1, with Wilson's interval."""
    n = len(values)
    return Figure(float(values.sum()) / n, *wilson(float(values.sum()), n), n)


def estimate(values: Array, items: Items, *, seed: int, name: str) -> Figure:
    """The figure of `values` [items], with a percentile interval of the bootstrap, which draws whole items anew, stratum by
    stratum. The draws depend on `seed` and `name` alone."""
    whole, draws = _resample(values[None], items, seed, name)
    return _figure(items.transform(whole)[0], items.transform(draws)[0], values.size)


def difference(values: Array, others: Array, items: Items, *, seed: int, name: str) -> Figure:
    """The figure of `values` less that of `others`, of the same items in the same order: both are drawn together, so that
    what makes an item hard for both cancels."""
    whole, draws = _resample(np.stack([values, others]), items, seed, name)
    first, second = items.transform(whole)
    resampled = items.transform(draws)
    return _figure(first - second, resampled[0] - resampled[1], values.size)


def _figure(value: Any, draws: Array, n: int) -> Figure:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(float(value), float(low), float(high), n)


def _resample(values: Array, items: Items, seed: int, name: str) -> tuple[Array, Array]:
    """Weighted means of `values` [rows, items]: of all items [rows], and of RESAMPLES draws [rows, RESAMPLES]."""
    generator = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])
    strata = np.zeros(len(items.weights), dtype=np.int64) if items.strata is None else items.strata
    sums, weights = np.zeros((len(values), RESAMPLES)), np.zeros(RESAMPLES)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        size = max(1, DRAWS_IN_MEMORY // len(members))
        for begin in range(0, RESAMPLES, size):
            end = min(begin + size, RESAMPLES)
            drawn = members[generator.integers(0, len(members), (end - begin, len(members)))]
            sums[:, begin:end] += values[:, drawn].sum(axis=-1)
            weights[begin:end] += items.weights[drawn].sum(axis=-1)
    return values.sum(axis=1) / items.weights.sum(), sums / weights
