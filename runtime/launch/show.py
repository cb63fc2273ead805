"""What a person sees of a run: a live display in a terminal, plain lines elsewhere, and the table of stages."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as LiveProgress
from rich.text import Text

from trainwright.runtime.launch.status import Progress, read_progress
from trainwright.runtime.reading import format_duration, is_number, printable, read_json, read_last_row
from trainwright.runtime.workspace import StageFolder

READ_EVERY_S = 1.0  # how often a stage's progress is read
PLAIN_EVERY_S = 30.0  # how often it is printed where there is no terminal
STYLES = {"done": "green", "failed": "bold red", "interrupted": "yellow", "running": "cyan"}


def open_console() -> Console:
    """stdout: colours and live display in a terminal, plain text elsewhere; nothing in a text is taken for markup."""
    return Console(markup=False, highlight=False, emoji=False, soft_wrap=True)


def figures(row: dict[str, Any]) -> str:
    """What the live display shows of a row of `metrics.jsonl`."""
    parts = []
    if is_number(row.get("loss")):
        parts.append(f"loss {row['loss']:.3f}")
    if is_number(row.get("tokens_per_s")):
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)


def read_new_row(folder: StageFolder, since: float) -> dict[str, Any]:
    """The last row of the stage's metrics, if it was written after `since` (seconds of the epoch): by this attempt."""
    try:
        return read_last_row(folder.metrics) if folder.metrics.stat().st_mtime >= since else {}
    except OSError:
        return {}


def how_far(progress: Progress | None, row: dict[str, Any]) -> str:
    """ "120 of 710 steps; loss 3.214, 5,120 tokens/s", or as much of it as is known."""
    return "; ".join(part for part in (str(progress or ""), figures(row)) if part)


class Show:
    """Prints a run. Use as a context: the live display ends with it."""

    def __init__(self, console: Console, num_stages: int) -> None:
        self.console = console
        self.started = 0  # stages whose processes were started
        self._live: LiveProgress | None = None
        self._folder: StageFolder | None = None
        self._name, self._since, self._read_at, self._printed_at = "", 0.0, 0.0, 0.0
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._live = LiveProgress(*columns, console=console, transient=True, refresh_per_second=4)
            self._all = self._live.add_task("stages", total=num_stages, count=f"0/{num_stages}", figures="")
            self._num, self._task = num_stages, TaskID(-1)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(printable(text)))

    def start(self, name: str, folder: StageFolder) -> None:
        """A stage's processes have been started."""
        self.started += 1
        self._name, self._folder = name, folder
        self._since = time.time()
        self._read_at = self._printed_at = time.monotonic()
        if self._live:
            self._task = self._live.add_task(name, total=None, count="", figures="")

    def poll(self) -> None:
        """Show how far the running stage is; cheap, called often."""
        moment = time.monotonic()
        if self._folder is None or moment - self._read_at < READ_EVERY_S:
            return
        self._read_at = moment
        progress, row = read_progress(read_json(self._folder.progress)), read_new_row(self._folder, self._since)
        if self._live:
            done, total = (progress.done, progress.total) if progress else (0, None)
            count = str(progress or "")
            self._live.update(self._task, completed=done, total=total, count=count, figures=figures(row))
        elif moment - self._printed_at >= PLAIN_EVERY_S:
            self._printed_at = moment
            known = how_far(progress, row) or "running"
            self.say(f"{self._name}: {known} ({format_duration(time.time() - self._since)})")

    def finish(self, ended: bool) -> None:
        """A stage is through: `ended` when it is done, whether it ran or was unchanged."""
        self._folder = None
        if self._live:
            if self._task >= 0:
                self._live.remove_task(self._task)
                self._task = TaskID(-1)
            if ended:
                self._live.advance(self._all)
                completed = int(self._live.tasks[0].completed)
                self._live.update(self._all, count=f"{completed}/{self._num}")


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the second one, a state, in colour where there is any."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in [list(header), *cells]) for index in range(len(header))]
    for number, row in enumerate([list(header), *cells]):
        line = Text()
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            last = index == len(header) - 1
            style = "bold" if number == 0 else STYLES.get(cell, "") if index == 1 else ""
            line.append(cell if last else f"{cell:<{width}}  ", style=style)
        line.rstrip()
        console.print(line)
