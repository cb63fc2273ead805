"""What laws for learning rate and batch lose on the runs of Step Law, and what a batch that is forced should do to the rate.

    TRAINWRIGHT_REFERENCE=DIR python benchmarks/rates.py

The runs (arXiv 2503.04715: 1,911 dense ones, a grid of rates and batches at each of 17 pairs of N and D) are in the reference
folder; without one there is nothing to show. A regret is a run's smoothed loss / the least of its grid - 1. A law is judged by
the run nearest to what it says, in ln rate and ln batch. Step Law was fitted on these very runs.
"""

import csv
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainwright.compiler.facts import find_hyperparameter_law
from trainwright.compiler.laws.rates import Run, law_batch, law_rate, scale_rate

SEQUENCE = 2048  # tokens
LAWS = ("step_law", "deepseek_llm", "porian2024")
CONSTANTS = {"1e-3 and 524,288 tokens": (1e-3, 524_288.0), "3e-4 and 4M tokens": (3e-4, 4e6)}
NEAR = 1.25  # times: a batch nearer to the law's own than that is not a forced one
FEWEST_RATES = 6  # runs at a batch, to know its best rate
# What the rate of Step Law is multiplied by at a batch of `ratio` times its own.
RULES: Mapping[str, Callable[[float], float]] = {
    "the rate unchanged": lambda ratio: 1.0,
    "the root of the ratio": math.sqrt,
    "the root below, unchanged above": lambda ratio: float(scale_rate(ratio, 1.0)),
    "the ratio below, unchanged above": lambda ratio: min(1.0, ratio),
}


@dataclass(frozen=True)
class Trial:
    learning_rate: float
    batch_tokens: float
    loss: float


@dataclass(frozen=True)
class Grid:
    """The trials of one model on one number of tokens."""

    run: Run
    trials: tuple[Trial, ...]

    def regret(self, learning_rate: float, batch_tokens: float) -> float:
        """Of the trial nearest to these."""
        nearest = min(
            self.trials,
            key=lambda trial: math.hypot(
                math.log(trial.learning_rate / learning_rate), math.log(trial.batch_tokens / batch_tokens)
            ),
        )
        return nearest.loss / min(trial.loss for trial in self.trials) - 1

    def at(self, batch_tokens: float) -> "Grid":
        """The trials of one batch."""
        return Grid(self.run, tuple(trial for trial in self.trials if trial.batch_tokens == batch_tokens))


def load_grids(reference: Path) -> list[Grid]:
    """The grids by N and D, rising."""
    trials: dict[tuple[float, float, float], list[Trial]] = defaultdict(list)
    with (reference / "scaling" / "steplaw_dense_lr_bs_loss.csv").open(newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            parameters, attention = float(row["N"]), 12.0 * float(row["numl"]) * float(row["h"]) * SEQUENCE
            trial = Trial(float(row["lr"]), float(row["bs"]) * SEQUENCE, float(row["smooth loss"]))
            trials[parameters, float(row["D"]), 6 * parameters + attention].append(trial)
    # The file tells no vocabulary: Porian's count is taken without the output layer.
    return [Grid(Run(n, n, n, m, tokens, 1.0), tuple(trials[n, tokens, m])) for n, tokens, m in sorted(trials)]


def law_regrets(grids: Sequence[Grid], name: str) -> list[float]:
    """The regret of a law on each grid."""
    law = find_hyperparameter_law(name)
    return [grid.regret(float(law_rate(law, grid.run)), float(law_batch(law, grid.run))) for grid in grids]


def rule_regrets(grids: Sequence[Grid], rule: Callable[[float], float], *, above: bool) -> list[float]:
    """The regret of Step Law's rate under a rule, at each batch above (or below) its own, beside the best rate at that batch."""
    law, regrets = find_hyperparameter_law("step_law"), []
    for grid in grids:
        own, rate = float(law_batch(law, grid.run)), float(law_rate(law, grid.run))
        for batch in sorted({trial.batch_tokens for trial in grid.trials}):
            there, ratio = grid.at(batch), batch / own
            if len(there.trials) >= FEWEST_RATES and (ratio >= NEAR if above else ratio <= 1 / NEAR):
                regrets.append(there.regret(rate * rule(ratio), batch))
    return regrets


def main() -> None:
    folder = os.environ.get("TRAINWRIGHT_REFERENCE")
    if not folder:
        print("TRAINWRIGHT_REFERENCE names no folder: nothing to show")
        return
    grids, console = load_grids(Path(folder)), Console(width=120)
    table = Table("what says rate and batch", "mean regret", "largest", title=f"on {len(grids)} grids of N and D")
    for name in LAWS:
        table.add_row(name, *_shown(law_regrets(grids, name)))
    for name, (rate, batch) in CONSTANTS.items():
        table.add_row(f"constant: {name}", *_shown([grid.regret(rate, batch) for grid in grids]))
    console.print(table)
    table = Table("at a batch that is forced", "below: mean", "largest", "above: mean", "largest")
    for name, rule in RULES.items():
        below, above = (_shown(rule_regrets(grids, rule, above=side)) for side in (False, True))
        table.add_row(name, *below, *above)
    console.print(table)


def _shown(regrets: Sequence[float]) -> tuple[str, str]:
    return f"{100 * sum(regrets) / len(regrets):.3f} %", f"{100 * max(regrets):.2f} %"


if __name__ == "__main__":
    main()
