"""The verbs that execute a bundle, as plain functions: they print, return an exit code and raise RunError.

`trainwright run` and `python -m trainwright.runtime run` are made of these and print a RunError as `error: ...`. No torch here.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rich.console import Console

from trainwright.runtime.errors import INTERRUPTED, MissingExtra, RunError
from trainwright.runtime.launch.bundle import Bundle, edited_files, open_bundle
from trainwright.runtime.launch.execute import execute
from trainwright.runtime.launch.identity import Hashes, inputs_of, output_id, reason_to_run
from trainwright.runtime.launch.show import Show, open_console, print_table
from trainwright.runtime.launch.state import RunState, is_locked
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
) -> int:
    """Execute the stages that are not done. Returns 0, or `errors.INTERRUPTED` after Ctrl-C, SIGTERM or SIGHUP.

    `only`: just these stages. `start`: this stage and all after it, even if unchanged; not both. `data_root`: where relative
    inputs lie (default: what the spec said, from the current folder). `work`: where the run keeps its files (default:
    BUNDLE/work). `port`: of the rendezvous; 0: a free one. Raises a RunError for everything that a user can cause.
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
                execute(opened, workspace, show, only=only, start=start, port=port)
        except KeyboardInterrupt:
            _print_state(console, opened, workspace)
            console.print("interrupted; the same command goes on from here")
            return INTERRUPTED
        except RunError:
            if show.started:
                _print_state(console, opened, workspace)
                _report(console, opened, workspace)
            raise
    _print_state(console, opened, workspace)
    _print_sample(console, opened, workspace)
    _report(console, opened, workspace)
    return 0


def status_bundle(bundle: Path, *, data_root: Path | None = None, work: Path | None = None) -> int:
    """Print the table of stages from disk, and which ones `run_bundle` would run and why. Writes nothing. Returns 0."""
    console = open_console()
    opened = open_bundle(bundle)
    workspace = _workspace(opened, data_root, work)
    for note in edited_files(opened):
        console.print(printable(note))
    _print_state(console, opened, workspace)
    if is_locked(workspace.work):
        console.print("a run is executing now")
        return 0
    state, hashes = RunState(workspace.work, opened.manifest.run_id), Hashes(workspace.work)
    outputs: dict[str, str] = {}
    waiting: set[str] = set()  # stages that would run
    for stage in opened.stages:
        folder = workspace.stage(stage.name)
        outputs[stage.name] = output_id(folder, hashes)
        inputs = inputs_of(stage, outputs, workspace.data_root, hashes)
        reason = reason_to_run(stage, state[stage.name], opened.program_id(stage), inputs, folder, hashes)
        before = [need for need in stage.needs if need in waiting]
        if reason:
            waiting.add(stage.name)
            console.print(printable(f"{stage.name}: would run: {reason}"))
        elif before:
            waiting.add(stage.name)
            console.print(printable(f"{stage.name}: would run if the output of {before[0]} changes"))
    if not waiting:
        console.print("every stage is done")
    return 0


def _workspace(opened: Bundle, data_root: Path | None, work: Path | None) -> Workspace:
    root = data_root if data_root is not None else Path(opened.manifest.data_root)
    folder = work if work is not None else opened.path / "work"
    return Workspace(bundle=opened.path.resolve(), work=_real(folder), data_root=_real(root))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises for a loop of links, before Python 3.13


def _print_state(console: Console, opened: Bundle, workspace: Workspace) -> None:
    state, locked = RunState(workspace.work, opened.manifest.run_id), is_locked(workspace.work)
    rows = []
    for stage in opened.stages:
        now = state[stage.name]
        # "running" with nobody there: the runner was killed, and its stages with it.
        word = "interrupted" if now.state == "running" and not locked else now.state
        key_figure = str(read_json(workspace.stage(stage.name).summary).get("key_figure", ""))
        figure = key_figure if now.state == "done" else now.note
        rows.append((stage.name, word, format_duration(now.duration_s) if now.attempts else "", figure))
    console.print()
    print_table(console, HEADER, rows)


def _print_sample(console: Console, opened: Bundle, workspace: Workspace) -> None:
    for stage in opened.stages:
        sample = read_json(workspace.stage(stage.name).summary).get("sample")
        if sample:
            console.print(printable(f"\nsample of {stage.name}:\n{sample}"))


def _report(console: Console, opened: Bundle, workspace: Workspace) -> None:
    try:
        path = write_report(opened.path, opened.manifest, workspace)
    except MissingExtra as error:  # the run itself lacks nothing
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
