"""Plan -> text for people: the summary that `plan` prints, and the reasons that `explain` prints."""

import difflib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainwright.compiler.cost_table import assumption_rows, cost_rows
from trainwright.compiler.errors import UsageError
from trainwright.compiler.estimate.layouts import DEGREES
from trainwright.compiler.plan import Interval, Plan, decided_leaves, leaves
from trainwright.compiler.plan_stages import Dpo, Reinforced, Reward, Sft, TuningSchedule
from trainwright.compiler.units import format_count, format_quantity

_FILE_WIDTH = 100_000  # columns: in a file nothing is wrapped or cut
# Lines of the summary that a plan without a pretrain stage does not have.
_PRETRAINING = ("data", "training", "learning rate", "sized", "loss", "epochs", "rounds", "pretraining")


def show(renderable: RenderableType, out: TextIO) -> None:
    """Print to `out`: fitted and coloured on a terminal; plain, whole lines without trailing space elsewhere."""
    if out.isatty():
        Console(file=out, highlight=False).print(renderable)
        return
    text = io.StringIO()
    Console(file=text, width=_FILE_WIDTH, color_system=None, highlight=False).print(renderable)
    out.writelines(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def explain_all(plan: Plan) -> RenderableType:
    """Every decided leaf, with its value, the kind of its reason, and the reason."""
    rows = [
        (path, shown(value), plan.reasons[path].kind, plan.reasons[path].text) for path, value in decided_leaves(plan)
    ]
    return table(("leaf", "value", "kind", "why"), rows)


def explain_field(plan: Plan, field: str) -> RenderableType:
    """The leaves at, under, or called `field`, or of the stage that it names, each with its reason in full.

    Raises UsageError when there is none.
    """
    everything = dict(leaves_of(plan))
    chosen = [path for path in everything if path == field or path.startswith((f"{field}.", f"{field}["))]
    chosen = chosen or [path for path, _ in decided_leaves(plan) if path.rpartition(".")[2] == field]
    chosen = chosen or _of_stage(everything, field)
    if not chosen:
        last_names = (path.rpartition(".")[2] for path, _ in decided_leaves(plan))
        stages = (stage.name for stage in plan.stages)
        known = sorted({*everything, *_sections(everything), *last_names, *stages})
        near = difflib.get_close_matches(field, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"its parts are {', '.join(_parts(everything))}"
        raise UsageError(f"explain {field}: the plan has no such leaf; {hint}")
    parts: list[RenderableType] = []
    for path in chosen:
        reason = plan.reasons.get(path)
        kind, text = (reason.kind, reason.text) if reason is not None else ("estimate", _how(plan, path))
        parts += [
            Text(f"{path} = {shown(everything[path])}  ({kind})", style="bold"),
            Padding(Text(text), (0, 0, 0, 4)),
        ]
    return Group(*parts)


def _of_stage(everything: dict[str, object], field: str) -> list[str]:
    """The leaves of a stage as the spec calls it: its name, `stages.<name>`, or one of these and the end of a leaf."""
    name, _, rest = field.removeprefix("stages.").partition(".")
    places = (re.fullmatch(r"(\w+\[\d+\]\.)(stage|name)", path) for path, value in everything.items() if value == name)
    homes = tuple(place[1] for place in places if place)
    of_it = (path for path in everything if path.startswith(homes))
    return [path for path in of_it if not rest or f".{rest}." in re.sub(r"\[\d+\]", "", f"{path}.")]


def _how(plan: Plan, path: str) -> str:
    """Where an estimate comes from."""
    law = plan.estimates.law
    texts = {
        "rounds": "what a round counted on, and the size, tokens, step and rate it came to; the next counts on that rate",
        "parameters_80": f"10th to 90th percentile of the same question, asked of the bootstrap draws of {law}",
        "tokens_80": f"10th to 90th percentile of the same question, asked of the bootstrap draws of {law}",
        "loss_80": f"10th to 90th percentile of the loss of this model by the bootstrap draws of {law}",
        "predicted_loss": f"{law} at this size, as the law counts it, and the tokens of whole steps; its own unit",
        "epochs": "training tokens / data.unique_tokens",
        "inference_flops": "a third of the training FLOPs a token x scaling.inference_tokens",
        "critical_batch_tokens": "kaplan2020: twice the least tokens are needed at it",
        "batch_overhead": "(1 + batch / critical) / (1 + the law's own batch / critical) - 1 (McCandlish et al. 2018)",
    }
    name = re.split(r"[.\[]", path.removeprefix("estimates."))[0]
    return texts.get(name, "computed from the decided leaves")


def leaves_of(plan: Plan) -> Iterable[tuple[str, object]]:
    """The decided leaves, then the estimates."""
    yield from decided_leaves(plan)
    yield from leaves(plan.estimates, "estimates")


def _sections(paths: Iterable[str]) -> set[str]:
    return {path[:end] for path in paths for end, mark in enumerate(path) if mark in ".["}


def _parts(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.partition(".")[0].partition("[")[0] for path in paths))


def shown(value: object) -> str:
    """A leaf's value on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return ", ".join(shown(item) for item in value) or "none"
    return str(value) or "-"


def summary(plan: Plan) -> RenderableType:
    """What is trained, how, where, what it is expected to take, the stages and their costs, warnings and alternatives."""
    lines = {**_trained(plan), **_laid_out(plan), **_expected(plan)}
    if not any(stage.kind == "pretrain" for stage in plan.stages):
        lines = {name: line for name, line in lines.items() if name not in _PRETRAINING}
    parts: list[RenderableType] = [
        Text(f"{plan.name}  (run {plan.run_id})", style="bold"),
        table(("", ""), lines.items(), header=False),
        Text(""),
        _stages(plan),
        Text(""),
        table(*cost_rows(plan)),
        Text(""),
        table(("costs of", "reckoned from"), assumption_rows(plan)),
    ]
    if plan.estimates.alternatives:
        parts += [Text(""), _alternatives(plan)]
    if plan.estimates.warnings:
        parts += [Text(""), *(Text(f"warning: {warning}", style="yellow") for warning in plan.estimates.warnings)]
    parts += [Text(""), Text(f"`trainwright explain` says why, for each of {len(plan.reasons)} values")]
    return Group(*parts)


def _trained(plan: Plan) -> dict[str, str]:
    shape, data, training, estimates = plan.shape, plan.data, plan.training, plan.estimates
    active = f" ({_count(estimates.active_parameters)} active)" if shape.num_experts else ""
    if estimates.padded_parameters != estimates.parameters:
        active += f", {estimates.padded_parameters:,} with the vocabulary padded"
    weighted = data.mixture == "weighted"
    sources = ", ".join(
        f"{source.name} {format_quantity('fraction', source.weight)}" if weighted else source.name
        for source in data.sources
    )
    decay = f" in the last {format_count(training.decay_steps, 'step')}" if training.decay_steps else ""
    course = f" to {training.min_learning_rate:g}{decay}" if training.schedule != "constant" else ""
    lines = {
        "model": f"{shape.family}, {_count(estimates.parameters)} parameters{active}: {format_count(shape.num_layers, 'layer')}"
        f" of {shape.hidden_size}, ffn {shape.ffn_hidden_size}, {format_count(shape.num_attention_heads, 'head')} of"
        f" {shape.head_dim} ({shape.num_query_groups} key-value), vocabulary {shape.vocab_size}",
        "data": f"{format_quantity('tokens', data.budget_tokens)} of {sources}"
        f"{'' if weighted else ', in proportion to their tokens'}",
        "training": f"{format_count(training.steps, 'step')} x {format_count(training.global_batch, 'sequence')} x"
        f" {format_count(training.context_length, 'token')}"
        f" ({format_quantity('tokens', training.tokens_per_step)} a step), {training.precision}, {training.optimizer}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule}{course},"
        f" warm-up {format_count(training.warmup_steps, 'step')}",
    }
    if sized := _bands(plan):
        lines["sized"] = sized
    if estimates.predicted_loss:
        band = f" ({_between(estimates.loss_80, '.3f')}, 80 %)" if estimates.loss_80.high else ""
        lines["loss"] = f"{estimates.predicted_loss:.3f}{band} nats a token, predicted by {estimates.law}"
    if estimates.epochs:
        lines["epochs"] = f"{estimates.epochs:.3g} of {format_quantity('tokens', estimates.unique_tokens)}"
    if len(estimates.rounds) > 1:
        lines["rounds"] = _rounds(plan)
    return lines


def _bands(plan: Plan) -> str:
    """What size and tokens the law's data leave open."""
    estimates = plan.estimates
    bands = [
        f"{format_quantity(kind, band.low)} to {format_quantity(kind, band.high)}"
        for kind, band in (("parameters", estimates.parameters_80), ("tokens", estimates.tokens_80))
        if band.high
    ]
    return f"{estimates.law}: {' and '.join(bands)} in 80 % of refits to resampled runs" if bands else ""


def _between(band: Interval, digits: str) -> str:
    return f"{band.low:{digits}} to {band.high:{digits}}"


def _rounds(plan: Plan) -> str:
    """The loop between limits and layout: what each round counted on, and what its layout reaches."""
    devices = plan.cluster.nodes * plan.cluster.devices_per_node
    first, last = plan.estimates.rounds[0], plan.estimates.rounds[-1]
    return (
        f"{len(plan.estimates.rounds)} between limit and layout: {first.flops_per_s / devices:.3g} model FLOP/s a device assumed,"
        f" {last.reached_flops_per_s / devices:.3g} reached in the end"
    )


def _laid_out(plan: Plan) -> dict[str, str]:
    layout, cluster = plan.layout, plan.cluster
    extras = [
        f"recompute {layout.recompute}",
        *(["sequence parallel"] if layout.sequence_parallel else []),
        *(["distributed optimizer"] if layout.distributed_optimizer else []),
        plan.kernels.layer_spec,
    ]
    degrees = " x ".join(
        f"{name.replace('_', ' ')} {n}"
        for name in DEGREES
        if (n := getattr(layout, name)) > 1 or name in ("tensor", "pipeline", "data")
    )
    return {
        "devices": f"{format_count(cluster.nodes, 'node')} x {cluster.devices_per_node} x {cluster.device}",
        "layout": f"{degrees}, micro-batch {layout.micro_batch} x {layout.micro_batches} a step; {', '.join(extras)}",
    }


def _expected(plan: Plan) -> dict[str, str]:
    estimates, memory = plan.estimates, plan.estimates.memory
    cost = f", {format_quantity('money', estimates.cost_usd)}" if estimates.cost_usd else ""
    shares = ("parameters", "gradients", "optimizer", "activations", "logits", "overhead")
    return {
        "step": f"{_seconds(estimates.step_s)} ({_seconds(estimates.step_s_low)} to {_seconds(estimates.step_s_high)}),"
        f" {estimates.tokens_per_s_per_device:,.0f} tokens/s a device, {estimates.mfu:.1%} of peak",
        "memory": f"{_bytes(memory.total)} of {_bytes(memory.capacity)} a device: "
        + ", ".join(f"{share} {_bytes(getattr(memory, share))}" for share in shares),
        "pretraining": f"{format_quantity('time', estimates.train_s)}, "
        f"{format_quantity('device_hours', estimates.device_hours)}{cost},"
        f" {estimates.model_flops_per_step * plan.training.steps:.3g} FLOPs",
    }


def _stages(plan: Plan) -> RenderableType:
    settings = dict(_settings(plan))
    rows = [
        (
            stage.name,
            stage.kind if stage.kind != stage.name else "",
            "implied" if stage.implied else "written",
            ", ".join(dict.fromkeys(name for name in (stage.initial, *stage.needs) if name)),
            settings.get(stage.name, ""),
        )
        for stage in plan.stages
    ]
    return table(("stage", "kind", "in the spec", "reads", "settings"), rows)


def _settings(plan: Plan) -> Iterator[tuple[str, str]]:
    """(stage, what is particular to it, on one line)."""
    for stage in plan.stages:
        if stage.kind == "curate":
            curation = plan.data.curation
            near = (
                f"near-duplicates from {curation.near_duplicates:g}" if curation.near_duplicates else "exact duplicates"
            )
            yield stage.name, f"{near}, personal data: {', '.join(curation.scrub) or 'kept'}"
    for sft in plan.sft:
        yield sft.stage, _tuned(plan, sft, 1)
    for reward in plan.reward:
        yield reward.stage, _tuned(plan, reward, 2)
    for dpo in plan.dpo:
        yield dpo.stage, f"{_tuned(plan, dpo, 2)}, beta {dpo.beta:g}, nll {dpo.nll:g}"
    for reinforced in (*plan.ppo, *plan.grpo):
        yield reinforced.stage, _reinforced(reinforced)
    for evaluate in plan.evaluate:
        records = [records.name for records in (*evaluate.conversations, *evaluate.preferences)]
        measured = [*(["text"] if evaluate.text else []), *records, *(task.name for task in evaluate.tasks)]
        gates = ", ".join(f"{gate.metric} {gate.threshold:g}" for gate in evaluate.gates)
        beside = f", beside {', '.join(evaluate.compare)}" if evaluate.compare else ""
        yield evaluate.stage, f"{', '.join(measured) or 'nothing'}{beside}{f'; gates: {gates}' if gates else ''}"
    for export in plan.export:
        yield export.stage, f"logits within {export.tolerance:g}"


def _tuned(plan: Plan, stage: Sft | Reward | Dpo, contexts: int) -> str:
    given = stage.training
    return (
        f"{stage.path or stage.connector}, {format_count(given.epochs, 'epoch')} of"
        f" {format_count(given.global_batch, 'row')} x {contexts * plan.training.context_length} tokens, {_rate(given)}"
    )


def _reinforced(stage: Reinforced) -> str:
    given = stage.training
    return (
        f"{stage.path}, {format_count(given.epochs, 'epoch')} of {format_count(stage.prompts, 'prompt')} x"
        f" {format_count(stage.volume.samples, 'sample')}, scored by {stage.reward}, {_rate(given)},"
        f" kl {stage.kl:g}, clip {stage.clip:g}"
    )


def _rate(given: TuningSchedule) -> str:
    end = "" if given.schedule == "constant" else f" to {given.min_learning_rate:g}"
    return f"rate {given.learning_rate:g}, {given.schedule}{end}"


def _alternatives(plan: Plan) -> RenderableType:
    rows = [
        (
            *(str(degree) for degree in (other.tensor, other.pipeline, other.data, other.micro_batch)),
            other.recompute,
            _seconds(other.step_s),
            _bytes(other.memory_bytes),
        )
        for other in plan.estimates.alternatives
    ]
    return table(("or: tensor", "pipeline", "data", "micro-batch", "recompute", "step", "memory"), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], header: bool = True) -> Table:
    """Rows of text under `columns`; where a terminal is narrow, the last one wraps."""
    built = Table(box=None, show_header=header, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        # The last column is the one to wrap when a terminal is narrow.
        built.add_column(Text(column), overflow="fold", no_wrap=index < len(columns) - 1)
    for row in rows:
        built.add_row(*(Text(cell) for cell in row))
    return built


def _count(number: int) -> str:
    return format_quantity("parameters", number)


def _bytes(amount: int) -> str:
    return format_quantity("bytes", amount)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
