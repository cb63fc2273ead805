"""Writes `work/report.html`: one file, nothing loaded from elsewhere, every text escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trainwright.runtime.manifest import PLAN_FILE, Manifest
from trainwright.runtime.reading import format_duration, is_number, read_json
from trainwright.runtime.report.charts import plotly_script, share_chart, training_charts
from trainwright.runtime.report.curves import MAX_POINTS, read_metrics
from trainwright.runtime.report.evaluation import read_evaluation
from trainwright.runtime.workspace import Workspace, write_atomically

REPORT_FILE = "report.html"
RESULTS_FILE = "results.json"  # of an evaluation
# What the page says of the plan: path in plan.json, and the word for it.
PLAN_FIGURES = (
    ("cluster.device", "device"),
    ("cluster.nodes", "nodes"),
    ("cluster.devices_per_node", "devices a node"),
    ("estimates.parameters", "parameters"),
    ("training.precision", "precision"),
    ("training.context_length", "context, tokens"),
    ("training.global_batch", "batch, sequences"),
    ("training.steps", "steps"),
    ("layout.tensor", "tensor"),
    ("layout.pipeline", "pipeline"),
    ("layout.data", "data"),
    ("estimates.predicted_loss", "loss predicted by the law, nats a token"),
)


def write_report(bundle: Path, manifest: Manifest, workspace: Workspace) -> Path:
    """The page of a run that may be finished, failed or not begun; its path. Raises MissingExtra without plotly."""
    script = plotly_script()
    plan, state = read_json(bundle / PLAN_FILE), read_json(workspace.work / "state.json").get("stages", {})
    stages = [_stage(workspace, stage.name, stage.kind, state.get(stage.name, {}), plan) for stage in manifest.stages]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainwright.runtime.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    facts = [(word, _figure(value)) for path, word in PLAN_FIGURES if (value := _at(plan, path))]
    text = environment.get_template("page.html.j2").render(
        name=manifest.name,
        run_id=manifest.run_id,
        facts=facts,
        stages=stages,
        has_charts=any(stage["charts"] for stage in stages),
        max_points=MAX_POINTS,
        plotly=Markup(script),  # plotly's own file, as installed
    )
    path = workspace.work / REPORT_FILE
    write_atomically(path, text)
    return path


def _stage(
    workspace: Workspace, name: str, kind: str, state: Mapping[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    folder = workspace.stage(name)
    done = state.get("state") == "done"
    summary = read_json(folder.summary) if done else {}
    rows = read_metrics(folder.metrics)
    # The plan's estimates are of the model's pretraining.
    expected = _at(plan, "estimates.tokens_per_s") if kind == "pretrain" else None
    charts = training_charts(name, rows, float(expected) if expected else 0.0) if rows else []
    # Written before a gate is judged: a stage that failed by one has it too.
    evaluation = read_evaluation(read_json(folder.output / RESULTS_FILE))
    if evaluation:
        charts += share_chart(name, evaluation)
    return {
        "name": name,
        "state": state.get("state", "pending"),
        "duration": format_duration(state["duration_s"]) if "duration_s" in state and state.get("attempts") else "",
        "attempts": state.get("attempts", 0),
        "key_figure": str(summary.get("key_figure", "") if done else state.get("note", "")),
        "sample": str(summary.get("sample", "")),
        "figures": list(
            _scalars({key: value for key, value in summary.items() if key not in ("key_figure", "sample")})
        ),
        # plotly escapes what it writes into its script; names were escaped before (charts.py).
        "evaluation": evaluation,
        "has_curves": bool(rows),
        "charts": [(chart.title, Markup(chart.html)) for chart in charts],
    }


def _scalars(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(path, figure) of every number and short text in a summary."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping):
            found += _scalars(item, f"{path}.")
        elif is_number(item) or (isinstance(item, str) and 0 < len(item) <= 120):
            found.append((path, _figure(item)))
    return found


def _at(value: Any, path: str) -> Any:
    """The leaf of nested objects; None where there is none."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
    return f"{value:,}" if is_number(value) else str(value)
