"""What `trainwright fit` prints: a table, or one JSON object."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainwright.compiler.fit.approach2 import CAVEAT, Approach2
from trainwright.compiler.fit.approach3 import DELTA
from trainwright.compiler.fit.result import Estimate, Fit, estimate
from trainwright.compiler.fit.runs import Runs
from trainwright.compiler.fit.suggest import Sweep
from trainwright.compiler.units import format_quantity

WORST = 5  # residuals that are listed
MEANINGS = {"a": "N ~ C^a along the frontier"}


def fit_table(fit: Fit, budgets: Sequence[float]) -> RenderableType:
    """Constants with intervals, what they say of budgets, the worst runs, approach 2 beside, and what forbids extrapolation."""
    runs = fit.runs
    size = np.abs(fit.residuals())
    head = (
        f"{len(runs)} runs: params {_span(runs.params)}, tokens {_span(runs.tokens)}, FLOPs {_span(runs.model_flops)}\n"
        f"objective {fit.objective:.9g} (sum of Huber losses of ln L, threshold {DELTA:g}); error: median "
        f"{100 * float(np.median(size)):.2g} %, largest {100 * float(size.max()):.2g} %"
    )
    parts: list[RenderableType] = [
        Text("L = E + A / N^alpha + B / D^beta", style="bold"),
        Text(head),
        Text(""),
        _constants(fit),
        Text(""),
        _at_budgets(fit, budgets),
        Text(""),
        _worst(fit),
        Text(""),
        *(Text(line) for line in _approach2_lines(fit.approach2)),
    ]
    remarks = (*(f"note: {note}" for note in runs.notes), *(f"warning: {text}" for text in fit.warnings(budgets)))
    return Group(*parts, *(Text(remark) for remark in remarks))


def sweep_table(sweep: Sweep) -> RenderableType:
    """The runs to make, and how much they are expected to narrow the law."""
    table = _table("params", "tokens", "tokens a parameter", "FLOPs")
    for params, tokens, flops in zip(sweep.params, sweep.tokens, sweep.flops, strict=True):
        table.add_row(_count("parameters", params), _count("tokens", tokens), f"{tokens / params:.3g}", f"{flops:.3g}")
    size, loss = (100 * (1 - after / before) for before, after in (sweep.size_sd, sweep.loss_sd))
    head = (
        f"{len(sweep.params)} runs to add, {sweep.flops.sum():.3g} of {sweep.budget:.3g} FLOPs;\n"
        f"by the constants of {sweep.law} they narrow the interval of the best size at {sweep.target:.3g} FLOPs by {size:.0f} %, "
        f"and of the loss by {loss:.0f} %"
    )
    return Group(Text(""), Text(head), table)


def fit_json(fit: Fit, budgets: Sequence[float], law: dict[str, Any] | None) -> dict[str, Any]:
    """The fit as JSON's types: A, B, E, alpha, beta and objective at the top; NaN is null."""
    estimates = fit.estimates()
    return {
        **fit.constants,
        "objective": fit.objective,
        "a": estimates["a"].value,
        "runs": len(fit.runs),
        "intervals": {name: _intervals(one) for name, one in estimates.items()},
        "budgets": [
            {"flops": flops, **{name: {"value": one.value, **_intervals(one)} for name, one in fit.at(flops).items()}}
            for flops in budgets
        ],
        "residuals": [
            {"line": line, "loss": float(loss), "law": float(loss / math.exp(residual)), "log_ratio": float(residual)}
            for line, loss, residual in zip(fit.runs.lines, fit.runs.loss, fit.residuals(), strict=True)
        ],
        "approach2": _approach2_json(fit.approach2),
        "refusals": list(fit.refusals),
        "notes": list(fit.runs.notes),
        "warnings": fit.warnings(budgets),
        "law": law,
    }


def sweep_json(sweep: Sweep) -> dict[str, Any]:
    """The runs to make, and what is expected of them."""
    rows = zip(sweep.params, sweep.tokens, sweep.flops, strict=True)
    return {
        "budget": sweep.budget,
        "target": sweep.target,
        "constants_of": sweep.law,
        "runs": [{"params": float(n), "tokens": float(d), "flops": float(c)} for n, d, c in rows],
        "flops": float(sweep.flops.sum()),
        "log_params_sd": {"before": sweep.size_sd[0], "after": sweep.size_sd[1]},
        "log_loss_sd": {"before": sweep.loss_sd[0], "after": sweep.loss_sd[1]},
    }


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _constants(fit: Fit) -> Table:
    table = _table("", "all runs", "80 %", "95 %", "")
    for name, one in fit.estimates().items():
        bounds = (f"{low:.5g} to {high:.5g}" for low, high in (one.interval_80, one.interval_95))
        table.add_row(name, f"{one.value:.7g}", *bounds, MEANINGS.get(name, ""))
    return table


def _at_budgets(fit: Fit, budgets: Sequence[float]) -> Table:
    table = _table(
        "FLOPs", "x largest run", "best params (80 %)", "tokens (80 %)", "tokens a parameter (80 %)", "loss (80 %)"
    )
    for flops in budgets:
        at = fit.at(flops)
        table.add_row(
            f"{flops:.3g}",
            f"{flops / fit.runs.model_flops.max():.3g}",
            _with_band(at["params"], lambda value: _count("parameters", value)),
            _with_band(at["tokens"], lambda value: _count("tokens", value)),
            _with_band(at["ratio"], lambda value: f"{value:.3g}"),
            _with_band(at["loss"], lambda value: f"{value:.4g}"),
        )
    return table


def _worst(fit: Fit) -> Table:
    residual = fit.residuals()
    table = _table("furthest off: line", "params", "tokens", "loss", "law", "off")
    for index in np.argsort(-np.abs(residual), kind="stable")[:WORST]:
        table.add_row(
            str(fit.runs.lines[index]),
            _count("parameters", fit.runs.params[index]),
            _count("tokens", fit.runs.tokens[index]),
            f"{fit.runs.loss[index]:.4g}",
            f"{fit.runs.loss[index] / math.exp(residual[index]):.4g}",
            f"{100 * math.expm1(residual[index]):+.2g} %",
        )
    return table


def _approach2_lines(found: Approach2) -> list[str]:
    excluded = [f"  {one.flops:.3g} FLOPs, {one.runs} runs: {one.excluded}" for one in found.sets if one.excluded]
    if found.note:
        return [f"approach 2: none: {found.note}", *excluded]
    used = len(found.sets) - len(excluded)
    low, high = estimate(found.a, found.draws[:, 1]).interval_80
    line = f"approach 2: N = {found.k:.4g} C^{found.a:.4f} (80 % {low:.4f} to {high:.4f}), from the parabolas of {used} budgets"
    return [line, f"  {CAVEAT}", *excluded]


def _approach2_json(found: Approach2) -> dict[str, Any]:
    k, a = (estimate(value, found.draws[:, column]) for column, value in enumerate((found.k, found.a)))
    return {
        "k": found.k,
        "a": found.a,
        "intervals": {"k": _intervals(k), "a": _intervals(a)},
        "note": found.note,
        "sets": [
            {
                "flops": one.flops,
                "runs": one.runs,
                "params": one.best_params,
                "tokens": one.best_tokens,
                "loss": one.best_loss,
                "excluded": one.excluded,
            }
            for one in found.sets
        ],
    }


def _intervals(one: Estimate) -> dict[str, list[float]]:
    return {"80": list(one.interval_80), "95": list(one.interval_95)}


def _with_band(one: Estimate, shown: Any) -> str:
    if not math.isfinite(one.value):
        return "-"
    low, high = one.interval_80
    return f"{shown(one.value)} ({shown(low)} to {shown(high)})"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _span(values: Any) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _count(kind: str, value: float) -> str:
    return format_quantity(kind, float(f"{value:.3g}")).removesuffix(f" {kind}")


def refusal_text(runs: Runs, refusals: Iterable[str], written: str) -> str:
    """The message that goes with exit code 10."""
    return "\n".join([f"{runs.file}: these runs do not determine a law that may be extrapolated{written}", *refusals])
