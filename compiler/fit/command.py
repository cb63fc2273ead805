"""The verb `fit`, from a question to what is printed and written."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from trainwright.compiler.errors import InfeasibleError, UsageError
from trainwright.compiler.facts import COUNTS
from trainwright.compiler.fit.approach3 import Problem
from trainwright.compiler.fit.identify import AHEAD
from trainwright.compiler.fit.law_file import law_of, require_replaceable, write_law
from trainwright.compiler.fit.plot import require_plot, write_plot
from trainwright.compiler.fit.report import fit_json, fit_table, refusal_text, sweep_json, sweep_table, without_nan
from trainwright.compiler.fit.result import Fit, fit_runs
from trainwright.compiler.fit.runs import FEWEST_RUNS, Runs, read_runs
from trainwright.compiler.fit.suggest import Sweep, suggest
from trainwright.compiler.units import UnitError, parse_quantity

FLOPS = (1e3, 1e40)  # of budgets
NAMED = 3  # runs of a sweep, in a refusal


@dataclass(frozen=True)
class Question:
    """The command line: `suggest` and `target` are FLOPs as written, "" where not given."""

    runs: Path
    out: Path | None
    plot: Path | None
    suggest: str
    target: str
    counts: str
    bootstraps: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """What to print, what was written, and the refusal ("" where there is none) that ends the command with exit code 10."""

    table: RenderableType
    object: dict[str, Any]
    written: tuple[Path, ...]
    refusal: str

    def json(self) -> str:
        """One object, strict JSON."""
        return json.dumps(without_nan(self.object), indent=2, allow_nan=False)


def answer(question: Question, progress: Callable[[int], object] = lambda done: None) -> Answer:
    """Fit, suggest, write. Raises UsageError, FileError, RunsError, InfeasibleError, MissingExtra."""
    if question.counts not in COUNTS:
        raise UsageError(f"--counts {question.counts}: a column of params counts one of {', '.join(COUNTS)}")
    budget, target = _flops("--suggest", question.suggest), _flops("--target", question.target)
    if question.out is not None:
        require_replaceable(question.out)
    if question.plot is not None:
        require_plot(question.plot)
    only_suggest = bool(budget) and question.out is None and question.plot is None
    runs = read_runs(question.runs, fewest=1 if only_suggest else FEWEST_RUNS)
    target = target or AHEAD * float(runs.model_flops.max())
    if len(runs) < FEWEST_RUNS:
        return _only_a_sweep(suggest(runs, _problem(runs), None, budget, target), runs)
    fit = fit_runs(runs, question.bootstraps, question.seed, progress)
    budgets = tuple(sorted({*fit.budgets(), *((target,) if question.target and not fit.refusals else ())}))
    law = None if fit.refusals else law_of(fit, (question.out or question.runs).stem, question.counts)
    table, found = fit_table(fit, budgets), fit_json(fit, budgets, law)
    if budget:
        sweep = _sweep(fit, budget, target)
        table, found = Group(table, sweep_table(sweep)), found | {"suggest": sweep_json(sweep)}
    written = []
    if question.plot is not None:
        write_plot(fit, question.plot)
        written.append(question.plot)
    if question.out is not None and law is not None:
        write_law(law, question.out)
        written.append(question.out)
    asked = question.out is not None or not budget
    return Answer(table, found, tuple(written), _refusal(fit, question, target) if fit.refusals and asked else "")


def _sweep(fit: Fit, budget: float, target: float) -> Sweep:
    # What does not determine a law is no ground for the slopes of one.
    return suggest(fit.runs, fit.problem, None if fit.refusals else fit.theta, budget, target)


def _only_a_sweep(sweep: Sweep, runs: Runs) -> Answer:
    few = (
        f"{len(runs)} different runs, and a fit takes {FEWEST_RUNS}: the sweep starts from the constants of {sweep.law}"
    )
    found = {"refusals": [few], "notes": list(runs.notes), "law": None, "suggest": sweep_json(sweep)}
    return Answer(Group(few, sweep_table(sweep)), found, (), "")


def _refusal(fit: Fit, question: Question, target: float) -> str:
    written = f"; {question.out} is not written" if question.out is not None else ""
    return refusal_text(fit.runs, [*fit.refusals, *_most_helpful(fit, target)], written)


def _most_helpful(fit: Fit, target: float) -> list[str]:
    """The largest runs of the sweep that as many FLOPs would pay for as the runs took."""
    try:
        sweep = _sweep(fit, float(fit.runs.model_flops.sum()), target)
    except InfeasibleError:  # a target smaller than the runs
        return []
    largest = sorted(sweep.flops.argsort()[-NAMED:])
    named = ", ".join(f"{sweep.params[index]:.2g} params on {sweep.tokens[index]:.2g} tokens" for index in largest)
    return [f"most help: runs of {named}; `trainwright fit {fit.runs.file} --suggest FLOPS` plans a sweep"]


def _problem(runs: Runs) -> Problem:
    return Problem.of(runs.params, runs.tokens, runs.loss)


def _flops(option: str, text: str) -> float:
    """0.0 where nothing is written."""
    if not text:
        return 0.0
    try:
        flops = parse_quantity(text, ("flops",), "flops").amount
    except UnitError as error:
        raise UsageError(f"{option} {text}: {error}") from error
    if not FLOPS[0] <= flops <= FLOPS[1]:
        raise UsageError(
            f"{option} {text}: outside {FLOPS[0]:g} to {FLOPS[1]:g} FLOPs; a run of 1e8 params on 2e9 tokens takes 1.2e18"
        )
    return flops
