"""The verbs that execute a bundle, as plain functions: they print, return an exit code and raise RunError.

`trainwright run` and `python -m trainwright.runtime run` are made of these and print a RunError as `error: ...`. No torch here.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType

from rich.console import Console

from trainwright.runtime.disk import unusable_work
from trainwright.runtime.dry_run.planned import read_planned
from trainwright.runtime.dry_run.preflight import preflight
from trainwright.runtime.dry_run.show import show_findings
from trainwright.runtime.dry_run.verb import as_json as shadows_as_json
from trainwright.runtime.dry_run.verb import problem_of, shadow_bundle, show_shadows
from trainwright.runtime.errors import INTERRUPTED, BundleError, DiskFull, MissingExtra, RunError
from trainwright.runtime.launch.bundle import Bundle, choose_stages, edited_files, open_bundle
from trainwright.runtime.launch.execute import execute
from trainwright.runtime.launch.show import Show, how_far, open_console, print_table, read_new_row
from trainwright.runtime.launch.status import Status, read_status
from trainwright.runtime.reading import format_duration, printable, read_json
from trainwright.runtime.report.page import write_report
from trainwright.runtime.workspace import Workspace

HEADER = ("stage", "state", "duration", "key figure")


def run_bundle(
    bundle: Path,
    *,
    only: tuple[str, ...] = (),
    start: str = "",
    data_root: Path | None = None,
    work: Path | None = None,
    port: int = 0,
    retries: int | None = None,
) -> int:
    """Execute the stages that are not done. Returns 0, or `errors.INTERRUPTED` after Ctrl-C, SIGTERM or SIGHUP.

    `only`: just these stages. `start`: this stage and all after it, even if unchanged; not both. `data_root`: where relative
    inputs lie (default: what the spec said, from the current folder). `work`: where the run keeps its files (default:
    BUNDLE/work). `port`: of the rendezvous; 0: a free one. `retries`: of each stage (default: what the bundle says of it).
    Raises a RunError for everything that a user can cause.
    """
    console = open_console()
    opened = open_bundle(bundle)
    workspace = _workspace(opened, data_root, work)
    for note in edited_files(opened):
        console.print(printable(note))
    with _signals_as_ctrl_c():
        show = Show(console, len(set(only)) or len(opened.stages))
        try:
            with show:
                execute(opened, workspace, show, only=only, start=start, port=port, retries=retries)
        except KeyboardInterrupt:
            _print_state(console, opened, workspace)
            console.print("interrupted; the same command goes on from here")
            return INTERRUPTED
        except RunError:
            if show.started and workspace.work.is_dir():
                _print_state(console, opened, workspace)
                _report(console, opened, workspace)
            raise
    _print_state(console, opened, workspace)
    _print_sample(console, opened, workspace)
    _report(console, opened, workspace)
    return 0


def status_bundle(
    bundle: Path, *, data_root: Path | None = None, work: Path | None = None, as_json: bool = False
) -> int:
    """Print the table of stages from disk, and which ones `run_bundle` would run and why; `as_json`: one JSON object instead.

    Writes nothing, works while a run is executing. Returns 0.
    """
    opened = open_bundle(bundle)
    workspace = _workspace(opened, data_root, work)
    status = read_status(opened, workspace, reasons=True)
    if as_json:
        print(json.dumps(asdict(status), indent=2, ensure_ascii=False))
        return 0
    console = open_console()
    for note in edited_files(opened):
        console.print(printable(note))
    _print_status(console, status, workspace)
    if status.runner:
        console.print(printable(f"a run is executing now: {status.runner}"))
        return 0
    to_run = [stage for stage in status.stages if stage.would_run]
    for stage in to_run:
        reason = str(stage.would_run)
        console.print(printable(f"{stage.name}: would run{' ' if reason.startswith('if ') else ': '}{reason}"))
    if not to_run:
        console.print("every stage is done")
    return 0


def dry_run_bundle(
    bundle: Path,
    *,
    only: tuple[str, ...] = (),
    ranks: tuple[int, ...] = (),
    all_micro_batches: bool = False,
    strict: bool = False,
    tolerance: float = 0.0,
    trace: Path | None = None,
    data_root: Path | None = None,
    work: Path | None = None,
    as_json: bool = False,
) -> int:
    """Look at a bundle before it is run: its files, its inputs and this machine; then its programs on fake tensors, on some ranks
    of the planned cluster, beside the plan. Writes nothing but `trace`.

    `only`: just these stages. `ranks`: of the planned world (default: those that differ). `all_micro_batches`: run every one of
    a step, instead of scaling the steady state. `strict`: what this machine lacks is an error though it is not the plan's.
    `tolerance`: how much, relative to the plan, shadow and plan may differ. `trace`: a file for the step of the first rank, for
    Perfetto. `data_root`, `work`: as of `run_bundle`. `as_json`: one JSON object instead of tables.

    Returns 0, or `errors.INTERRUPTED` after Ctrl-C. Raises a RunError: for a damaged bundle, a program that fails, a shadow that
    disagrees with the plan (ShadowDiffers), a program that does not fit (DoesNotFit), and what is lacking (NotReady).
    """
    console = Console(stderr=True) if as_json else open_console()
    opened = open_bundle(bundle)
    choose_stages(opened, only, "")  # names that are none are refused
    planned = read_planned(opened.path)
    findings = preflight(opened, _workspace(opened, data_root, work), planned, strict=strict, only=only)
    if not as_json:
        show_findings(console, findings)
    try:
        judged = shadow_bundle(
            console,
            opened,
            planned,
            only=only,
            ranks=ranks,
            all_micro_batches=all_micro_batches,
            tolerance=tolerance,
            trace=trace,
        )
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return INTERRUPTED
    if as_json:
        whole = {"findings": [asdict(finding) for finding in findings], "stages": shadows_as_json(judged)}
        print(json.dumps({"bundle": str(opened.path)} | whole, indent=2, ensure_ascii=False))
    else:
        show_shadows(console, judged)
        if trace is not None and judged:
            console.print(printable(f"\ntrace: {trace} (open it in https://ui.perfetto.dev)"))
    problem = problem_of(judged, findings)
    if problem is not None:
        raise problem
    return 0


def _workspace(opened: Bundle, data_root: Path | None, work: Path | None) -> Workspace:
    root = data_root if data_root is not None else Path(opened.manifest.data_root)
    folder = work if work is not None else opened.path / "work"
    return Workspace(bundle=opened.path.resolve(), work=_real(folder), data_root=_real(root))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a loop of links, before Python 3.13


def _print_state(console: Console, opened: Bundle, workspace: Workspace) -> None:
    _print_status(console, read_status(opened, workspace, reasons=False), workspace)


def _print_status(console: Console, status: Status, workspace: Workspace) -> None:
    rows = []
    for stage in status.stages:
        figure = stage.key_figure if stage.state == "done" else stage.note
        if stage.state == "running":
            since = datetime.fromisoformat(stage.started).timestamp()
            figure = how_far(stage.progress, read_new_row(workspace.stage(stage.name), since))
        rows.append((stage.name, stage.state, format_duration(stage.duration_s) if stage.attempts else "", figure))
    console.print()
    print_table(console, HEADER, rows)


def _print_sample(console: Console, opened: Bundle, workspace: Workspace) -> None:
    for stage in opened.stages:
        sample = read_json(workspace.stage(stage.name).summary).get("sample")
        if sample:
            console.print(printable(f"\nsample of {stage.name}:\n{sample}"))


def _report(console: Console, opened: Bundle, workspace: Workspace) -> None:
    try:
        with unusable_work(workspace.work):
            path = write_report(opened.path, opened.manifest, workspace)
    except (MissingExtra, BundleError, DiskFull) as error:  # the run itself lacks nothing
        console.print(printable(f"\nno report: {error}"))
        return
    console.print(printable(f"\nreport: {path}"))


@contextlib.contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """SIGTERM (a scheduler, `timeout`) and SIGHUP (a lost connection) end a run in order, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # A shell's `&` and `nohup` have them ignored; SIGINT is taken back, since the runner must be stoppable by it.
    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
