"""What a person sees of a dry run: a table a rank, a verdict a stage."""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainwright.runtime.dry_run.compare import Comparison
from trainwright.runtime.dry_run.execute import Shadow
from trainwright.runtime.dry_run.preflight import ERROR, WARNING, Finding
from trainwright.runtime.dry_run.verdict import Verdict
from trainwright.runtime.reading import format_duration, printable
from trainwright.runtime.shadow.result import KINDS, RankResult

GIB = 2**30


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """A line each."""
    styles = {ERROR: "bold red", WARNING: "yellow"}
    for finding in findings:
        console.print(Text(printable(str(finding)), style=styles.get(finding.severity, "")))


def print_shadow(
    console: Console,
    shadow: Shadow,
    comparisons: Mapping[int, Sequence[Comparison]],
    verdict: Verdict | None,
    *,
    edited: bool,
) -> None:
    """`comparisons` by rank; a rank without any has no plan to compare with."""
    stage = shadow.stage
    devices = stage.nodes * stage.processes_per_node
    console.print()
    if shadow.configs_built:
        console.print(f"{stage.name}: {stage.program}: Megatron-Core accepts its configs")
        return
    console.print(Text(f"{stage.name}: {stage.program} in shadow, on {devices:,} devices", style="bold"))
    if edited:
        console.print("it was edited by hand: what runs is the edited program")
    if shadow.not_shadowed:
        console.print(Text(printable(f"not shadowed: {shadow.not_shadowed}"), style="yellow"))
    for failure in shadow.failures:
        console.print(Text(printable(f"rank {failure.rank}: {failure.message}"), style="bold red"))
    for result in shadow.results:
        _print_rank(console, result, comparisons.get(result.place.rank, ()))
    if verdict is not None:
        for line, style in _verdict_lines(stage.name, verdict):
            console.print(Text(line, style=style))


def _print_rank(console: Console, result: RankResult, comparisons: Sequence[Comparison]) -> None:
    console.print()
    console.print(Text(str(result.place), style="bold"))
    ran = "all" if result.ran == result.micro_batches else f"{result.ran}, and the steady state scaled to all"
    console.print(f"micro-batches: {result.micro_batches:,} (run: {ran}); {'; '.join(result.notes)}")
    _print_figures(console, result, comparisons)
    console.print(f"peak: {result.peak.moment}")
    if result.reference_peak_bytes:
        console.print(f"while the reference is asked before the first step: {_gib(result.reference_peak_bytes)}")
    _print_largest(console, result)
    _print_collectives(console, result)
    if result.stand_ins:
        console.print(Text(f"stand-ins: {', '.join(result.stand_ins)}", style="dim"))
    console.print(Text(f"took {format_duration(result.seconds)}", style="dim"))


def _print_figures(console: Console, result: RankResult, comparisons: Sequence[Comparison]) -> None:
    judged = {(comparison.quantity, comparison.module): comparison for comparison in comparisons}
    table = _table("figure", "of", ">in shadow", ">planned", ">difference", "by")
    for name, module, source, found in _figures(result):
        comparison = judged.get((name, module))
        planned, difference, style = "", "", ""
        if comparison is not None:
            planned = _amount(name, comparison.planned)
            difference = "none" if comparison.difference == 0 else f"{comparison.difference:+.2%}"
            style = "" if comparison.agrees else "bold red"
            difference += "" if comparison.agrees else " DIFFERS"
        table.add_row(name, module, _amount(name, found), planned, difference, result.sources[source], style=style)
    console.print(table)


def _figures(result: RankResult) -> Iterator[tuple[str, str, str, int]]:
    """(name, module, key of sources, amount)."""
    yield "parameters", "", "parameters", result.parameters
    for part in result.modules:
        if part.parameters:
            yield "parameters", part.module, "parameters", part.parameters
    yield "FLOPs", "", "flops", result.flops
    for part in result.modules:
        if part.flops:
            yield "FLOPs", part.module, "flops", part.flops
    for kind, amount in result.static_bytes.items():
        yield f"bytes of {kind}", "", kind, amount
    if result.activation_bytes:
        yield "bytes of activations", "a micro-batch", "activations", result.activation_bytes
    yield "bytes at the peak", "", "peak", result.peak_bytes
    for kind in KINDS:
        if kind in result.peak.by_kind:
            yield "bytes at the peak", kind, "peak", result.peak.by_kind[kind]


def _print_largest(console: Console, result: RankResult) -> None:
    table = _table(">largest at the peak", "kind", "shape", "made in", "by")
    for held in result.peak.largest:
        shape = f"{held.dtype} [{', '.join(f'{size:,}' for size in held.shape)}]"
        table.add_row(_gib(held.bytes), held.kind, shape, held.module or "(no module)", held.made_by)
    console.print(table)


def _print_collectives(console: Console, result: RankResult) -> None:
    if not result.collectives:
        return
    table = _table("collective", "group", ">ranks", ">count", ">bytes given")
    for message in result.collectives:
        table.add_row(message.operation, message.group, f"{message.size:,}", f"{message.count:,}", _gib(message.bytes))
    console.print(table)


def _verdict_lines(stage: str, verdict: Verdict) -> Iterator[tuple[str, str]]:
    by = "" if verdict.measured else ", by the plan's estimate"
    of = f"{_gib(verdict.needed_bytes)} of {_gib(verdict.capacity_bytes)} a device{by}"
    if verdict.fits:
        yield f"{stage} fits: {of}, {_gib(-verdict.missing_bytes)} left", "bold green"
        return
    on = f" on ranks {', '.join(map(str, verdict.ranks))}" if verdict.ranks else ""
    yield f"{stage} does not fit by {_gib(verdict.missing_bytes)}{on}: {of}", "bold red"
    for remedy in verdict.remedies:
        yield f"  would help: {remedy.change}: {_gib(remedy.memory_bytes)} a device, {remedy.step_s:.3g} s a step", ""
    if not verdict.remedies:
        yield (
            "  the plan knows no layout change that helps: more devices, a smaller model or a shorter context would",
            "",
        )


def _table(*columns: str) -> Table:
    """Columns that begin with ">" are aligned at the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _amount(name: str, amount: int) -> str:
    return _gib(amount) if name.startswith("bytes") else f"{amount:,}"


def _gib(amount: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(amount) >= size:
            return f"{amount / size:,.2f} {unit}"
    return f"{amount} B"
