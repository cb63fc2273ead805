"""What a plan's stages take, as rows of text: figures by stage, cost lines, sums, and from what each was reckoned."""

from collections.abc import Iterator

from trainwright.compiler.plan import Plan, StageEstimate
from trainwright.compiler.units import format_quantity

Rows = list[tuple[str, ...]]


def cost_rows(plan: Plan) -> tuple[tuple[str, ...], Rows]:
    """(columns, rows): the stages that are estimated, the user's cost lines, and the sums. No money where neither a price nor a
    cost line is stated."""
    estimates, totals = plan.estimates, plan.estimates.totals
    lines = [(line.name, *("-",) * 6, format_quantity("money", line.cost_usd)) for line in estimates.cost_lines]
    summed: tuple[str, ...] = (
        f"{totals.flops:.3g}",
        format_quantity("time", totals.duration_s),
        _hours(totals.device_hours),
        format_quantity("energy", totals.energy_kwh),
        format_quantity("mass", totals.co2_kg),
    )
    if not totals.device_hours:
        summed = ("-",) * len(summed)
    whole = ("in all", "-", *summed, format_quantity("money", totals.devices_usd + totals.lines_usd))
    stages = [(stage.name, *_figures(stage)) for stage in estimates.stages if stage.device_hours]
    columns = ("costs", "tokens", "FLOPs", "time", "device-hours", "energy", "CO2", "money")
    shown = len(columns) if totals.devices_usd or lines else len(columns) - 1
    return columns[:shown], [row[:shown] for row in (*stages, *lines, whole)]


def _figures(stage: StageEstimate) -> tuple[str, ...]:
    written = f" + {_count(stage.generated_tokens)} written" if stage.generated_tokens else ""
    return (
        f"{_count(stage.trained_tokens)}{written}",
        f"{stage.flops:.3g}",
        format_quantity("time", stage.train_s + stage.generate_s),
        _hours(stage.device_hours),
        format_quantity("energy", stage.energy_kwh),
        format_quantity("mass", stage.co2_kg),
        format_quantity("money", stage.cost_usd) if stage.cost_usd else "-",
    )


def assumption_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """(stages, cost line or "in all"; from what its figures were reckoned), stages with the same text together."""
    estimates = plan.estimates
    for text in dict.fromkeys(stage.assumption for stage in estimates.stages):
        yield ", ".join(stage.name for stage in estimates.stages if stage.assumption == text), text
    for line in estimates.cost_lines:
        yield line.name, line.assumption
    no_price = "" if estimates.totals.devices_usd else "; no price of a device is stated, so no money for them"
    yield "in all", estimates.totals.assumption + no_price


def _count(tokens: float) -> str:
    return format_quantity("parameters", tokens)


def _hours(hours: float) -> str:
    return format_quantity("device_hours", hours).removesuffix("s").removesuffix(" device-hour")
