"""One dry run from beginning to end: the shadow of each stage beside the plan, shown or as JSON, and what is wrong with it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trainwright.runtime.dry_run.compare import Comparison, compare
from trainwright.runtime.dry_run.execute import Shadow, choose_ranks, configured_stages, shadow_stages, shadowed_stages
from trainwright.runtime.dry_run.planned import Planned
from trainwright.runtime.dry_run.preflight import ERROR, Finding
from trainwright.runtime.dry_run.show import GIB, print_shadow
from trainwright.runtime.dry_run.verdict import Verdict, judge
from trainwright.runtime.errors import DataError, DoesNotFit, NotReady, RunError, ShadowDiffers, StageFailed
from trainwright.runtime.launch.bundle import Bundle
from trainwright.runtime.manifest import Stage


@dataclass(frozen=True)
class Judged:
    """A shadow, beside what the plan says. `comparisons` by rank."""

    shadow: Shadow
    comparisons: dict[int, tuple[Comparison, ...]]
    verdict: Verdict | None
    edited: bool

    @property
    def differences(self) -> list[str]:
        """Where shadow and plan do not agree, module before whole: the whole follows."""
        return [
            f"rank {rank}: {comparison}"
            for rank, comparisons in self.comparisons.items()
            for comparison in sorted(comparisons, key=lambda one: not one.module)
            if not comparison.agrees
        ]


def shadow_bundle(
    console: Console,
    bundle: Bundle,
    planned: Planned,
    *,
    only: Sequence[str] = (),
    ranks: Sequence[int] = (),
    all_micro_batches: bool = False,
    tolerance: float = 0.0,
    trace: Path | None = None,
) -> list[Judged]:
    """Shadow the programs of the stages in `only` (none: of all) and judge them; progress goes to `console`."""
    if trace is not None:
        _check_writable(trace)
    work = [(stage, choose_ranks(stage, planned, ranks)) for stage in shadowed_stages(bundle, only)]
    work += [(stage, (0,)) for stage in configured_stages(bundle, only)]
    with _progress(console, work) as done:
        shadows = shadow_stages(bundle, planned, work, all_micro_batches=all_micro_batches, trace=trace, done=done)
    return [_judge(bundle, planned, shadow, tolerance) for shadow in shadows]


def _check_writable(trace: Path) -> None:
    """Before minutes are spent. Raises DataError."""
    folder = trace.absolute().parent
    if not folder.is_dir():
        raise DataError(f"--trace {trace}: there is no folder {folder}; make it, or name another file")
    if trace.is_dir() or not os.access(trace if trace.exists() else folder, os.W_OK):
        raise DataError(f"--trace {trace}: cannot be written; name another file")


def _judge(bundle: Bundle, planned: Planned, shadow: Shadow, tolerance: float) -> Judged:
    program = planned.program(shadow.stage.name)
    comparisons = {}
    for result in shadow.results:
        rank = program.rank(result.place.pipeline) if program is not None else None
        if rank is not None:
            comparisons[result.place.rank] = compare(result, rank, tolerance)
    edited = bundle.program_id(shadow.stage) != shadow.stage.program_id
    return Judged(shadow, comparisons, judge(shadow, planned), edited)


def show_shadows(console: Console, judged: Sequence[Judged]) -> None:
    """A table a rank, a verdict a stage."""
    for one in judged:
        print_shadow(console, one.shadow, one.comparisons, one.verdict, edited=one.edited)


def problem_of(judged: Sequence[Judged], findings: Sequence[Finding] = ()) -> RunError | None:
    """The gravest that is wrong: a program that raises, one that disagrees with the plan, one that does not fit, what lacks."""
    for one in judged:
        for failure in one.shadow.failures:
            return StageFailed(f"{one.shadow.stage.name}: rank {failure.rank}: {failure.message}")
    for one in judged:
        if one.differences:
            shown, more = one.differences[:8], len(one.differences) - 8
            listed = "\n  ".join([*shown, *([f"and {more} more"] if more > 0 else [])])
            edited = (
                "it was edited by hand: --tolerance allows a difference"
                if one.edited
                else "please report it: it is a mistake"
            )
            return ShadowDiffers(
                f"{one.shadow.stage.name}: the program in shadow disagrees with the plan ({edited}):\n  {listed}"
            )
    for one in judged:
        if one.verdict is not None and not one.verdict.fits:
            return DoesNotFit(
                f"{one.shadow.stage.name} needs {one.verdict.needed_bytes / GIB:.2f} GiB a device of "
                f"{one.verdict.capacity_bytes / GIB:.2f} GiB: {one.verdict.missing_bytes / GIB:.2f} GiB too much"
            )
    grave = [finding.message for finding in findings if finding.severity == ERROR]
    return NotReady("not ready to be run:\n  " + "\n  ".join(grave)) if grave else None


def as_json(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """One object a stage, for `--json`."""
    return [
        {
            "stage": one.shadow.stage.name,
            "kind": one.shadow.stage.kind,
            "program": one.shadow.stage.program,
            "edited": one.edited,
            "not_shadowed": one.shadow.not_shadowed,
            "failures": [asdict(failure) for failure in one.shadow.failures],
            "verdict": asdict(one.verdict) if one.verdict is not None else None,
            "ranks": [
                asdict(result)
                | {"comparisons": [_compared(each) for each in one.comparisons.get(result.place.rank, ())]}
                for result in one.shadow.results
            ],
        }
        for one in judged
    ]


def _compared(comparison: Comparison) -> dict[str, Any]:
    judged = comparison.allowed < float("inf")
    plain = asdict(comparison) | {"allowed": comparison.allowed if judged else None, "agrees": comparison.agrees}
    return plain | {"difference": comparison.difference if abs(comparison.difference) < float("inf") else None}


@contextmanager
def _progress(console: Console, work: Sequence[tuple[Stage, tuple[int, ...]]]) -> Iterator[Any]:
    """Gives what is to be called as a rank is through. A bar a stage in a terminal, elsewhere a line a rank."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ranks"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {stage.name: progress.add_task(f"{stage.name} in shadow", total=len(ranks)) for stage, ranks in work}

        def done(stage: Stage) -> None:
            task = tasks[stage.name]
            progress.advance(task)
            if not console.is_terminal:
                one = progress.tasks[task]
                console.print(f"{one.description}: {one.completed:.0f} of {one.total:.0f} ranks")

        yield done
