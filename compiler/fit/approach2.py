"""Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): a parabola of the loss over ln N through the runs of each budget, and a
power law N = k C^a through the minima.

It needs no form of the loss, and so stands beside approach 3. Its exponent is unbiased; k is off where alpha and beta differ or
the sizes lie off centre: 0.3 % for sizes within 2 x of the best, 4 % within 16 x, for exponents like Chinchilla's (Czech et al.
2026, arXiv 2603.22339, second-hand).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainwright.compiler.fit.approach3 import Floats
from trainwright.compiler.fit.bootstrap import draw_weights
from trainwright.compiler.fit.runs import Runs

Ints = NDArray[np.int64]

WIDTH = 1.1  # FLOPs of a set, the most over the least
FEWEST_SIZES = 4  # one more than a parabola has coefficients
FEWEST_SETS = 3  # one more than a line has coefficients
CAVEAT = (
    "parabolas bias k where alpha and beta differ or the sizes lie off centre: 0.3 % within 2 x of the best size, 4 % within 16 x"
    " (Czech et al. 2026, arXiv 2603.22339)"
)


@dataclass(frozen=True)
class IsoFlops:
    """The runs of one budget and the minimum of their parabola; `excluded` says why the minimum does not count, or is ""."""

    flops: float  # geometric mean
    runs: int
    params: tuple[float, float]  # smallest and largest
    best_params: float  # nan where the parabola opens downwards
    best_loss: float
    excluded: str

    @property
    def best_tokens(self) -> float:
        """C / (6 N)."""
        return self.flops / (6 * self.best_params)


@dataclass(frozen=True)
class Approach2:
    """`sets` by rising FLOPs. k and a are nan with fewer than FEWEST_SETS minima, and `note` says so."""

    sets: tuple[IsoFlops, ...]
    k: float
    a: float
    draws: Floats  # of (k, a), shape (draws, 2); nan where a draw leaves too few minima
    note: str


def fit_minima(runs: Runs, draws: int, seed: int) -> Approach2:
    """The parabolas of all sets of at least FEWEST_SIZES sizes, and the power law through their minima."""
    groups = _groups(runs)
    sets = tuple(_minimum(runs, group) for group in groups)
    used = [index for index, one in enumerate(sets) if not one.excluded]
    if len(used) < FEWEST_SETS:
        count, out = len(sets), len(sets) - len(used)
        note = (
            f"{count} set{'s' if count != 1 else ''} of {FEWEST_SIZES} sizes or more at one budget (FLOPs within "
            f"{100 * (WIDTH - 1):.0f} %){f', {out} without a minimum inside' if out else ''}; a power law takes {FEWEST_SETS}"
        )
        return Approach2(sets, np.nan, np.nan, np.empty((0, 2)), note)
    flops = np.log([sets[index].flops for index in used])
    slope, level = _line(flops, np.log([[sets[index].best_params for index in used]]))
    generator = np.random.default_rng(seed)
    minima = np.stack([_drawn_minima(runs, groups[index], draws, generator) for index in used], axis=1)
    slopes, levels = _line(flops, minima)
    return Approach2(
        sets, float(np.exp(level[0])), float(slope[0]), np.column_stack([np.exp(np.minimum(levels, 700.0)), slopes]), ""
    )


def _groups(runs: Runs) -> list[Ints]:
    """Indices of runs whose FLOPs lie within WIDTH of the set's least."""
    order = np.argsort(runs.flops, kind="stable")
    groups: list[list[int]] = []
    for index in order:
        if groups and runs.flops[index] <= WIDTH * runs.flops[groups[-1][0]]:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    return [np.array(group) for group in groups if len(np.unique(runs.params[group])) >= FEWEST_SIZES]


def _minimum(runs: Runs, group: Ints) -> IsoFlops:
    size = np.log(runs.params[group])
    low, high = float(size.min()), float(size.max())
    centred = size - size.mean()
    curve, slope, level = np.polyfit(centred, runs.loss[group], 2)
    opens_down = curve <= 1e-12 * runs.loss[group].max()
    best = np.nan if opens_down else -slope / (2 * curve)
    where = best + size.mean()
    excluded = "the parabola has no minimum" if opens_down else ""
    if not opens_down and not low <= where <= high:
        side, more = ("below", "smaller") if where < low else ("above", "larger")
        excluded = f"the minimum lies {side} its sizes: add {more} models at this budget"
    return IsoFlops(
        flops=float(np.exp(np.log(runs.flops[group]).mean())),
        runs=len(group),
        params=(float(runs.params[group].min()), float(runs.params[group].max())),
        best_params=float(np.exp(min(where, 700.0))) if np.isfinite(where) else np.nan,
        best_loss=float(level - slope**2 / (4 * curve)) if not opens_down else np.nan,
        excluded=excluded,
    )


def _drawn_minima(runs: Runs, group: Ints, draws: int, generator: np.random.Generator) -> Floats:
    """ln N of the minimum of each bootstrap draw of a set; nan where the draw has none inside the set's sizes."""
    weights = draw_weights(generator, len(group), draws)
    size = np.log(runs.params[group])
    centred = (size - size.mean()) / size.std()
    powers = np.stack([np.ones_like(centred), centred, centred**2], axis=1)
    normal = np.einsum("kn,ni,nj->kij", weights, powers, powers)
    right = np.einsum("kn,n,ni->ki", weights, runs.loss[group], powers)
    sizes = ((weights > 0) @ (size[:, None] == np.unique(size))) > 0
    usable = sizes.sum(axis=1) >= 3
    found = np.full((draws, 3), np.nan)
    found[usable] = np.linalg.solve(normal[usable], right[usable, :, None])[:, :, 0]
    up = found[:, 2] > 0
    where = np.full(draws, np.nan)
    where[up] = -found[up, 1] / (2 * found[up, 2]) * size.std() + size.mean()
    where[(where < size.min()) | (where > size.max())] = np.nan
    return where


def _line(x: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """(slope, level) of each row of y over x, leaving out nan; nan with fewer than FEWEST_SETS points."""
    there = np.isfinite(rows)
    count = there.sum(axis=1)
    enough = count >= FEWEST_SETS
    y = np.where(there, rows, 0.0)
    slope, level = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    mean_x = (there @ x)[enough] / count[enough]
    mean_y = y.sum(axis=1)[enough] / count[enough]
    off = (x - mean_x[:, None]) * there[enough]
    slope[enough] = (off * y[enough]).sum(axis=1) / (off**2).sum(axis=1)
    level[enough] = mean_y - slope[enough] * mean_x
    return slope, level
