"""How a stage's processes ended: which one is to blame, and the error to raise for it."""

import contextlib
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from trainwright.runtime import errors
from trainwright.runtime.disk import LITTLE_BYTES, disk_full, free_bytes, says_disk_full
from trainwright.runtime.launch.local import FAILURES_FILE, Running
from trainwright.runtime.launch.packages import missing_package
from trainwright.runtime.manifest import Stage
from trainwright.runtime.reading import read_tail

TAIL_LINES = 20


@dataclass(frozen=True)
class Failure:
    """The process to blame. `exit_code` is negative for a signal; `rank` is -1 where torchrun itself failed."""

    rank: int
    exit_code: int


_OWN_ERRORS = {kind.exit_code: kind for kind in errors.RunError.__subclasses__()}


def find_failure(running: Running, exit_code: int) -> Failure:
    """Which process to blame for a non-zero `exit_code`.

    When one rank ends, its peers fail because of it, within the agent's polling interval: a signal from outside explains more
    than an exit code, a message of the runtime's own more than a traceback, and SIGTERM is what the agent sent.
    """
    if running.stage.launcher != "torchrun":
        return Failure(0, exit_code)
    try:
        failures = [Failure(**item) for item in json.loads((running.logs / FAILURES_FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return Failure(-1, exit_code)

    def order(failure: Failure) -> int:
        if failure.exit_code < 0:
            return 3 if failure.exit_code == -signal.SIGTERM else 0
        return 1 if failure.exit_code in _OWN_ERRORS else 2

    return min(failures, key=order)


def stage_error(running: Running, failure: Failure, work: Path) -> tuple[errors.RunError, str]:
    """(the error to raise for `failure`: what ended, how, and the last lines of its log; the same in a few words)."""
    stage = running.stage
    log = running.logs / ("torchrun.log" if failure.rank < 0 else f"rank-{failure.rank}.log")
    tail = read_tail(log, running.log_starts.get(log.name, 0))
    lines = [line for line in tail if line.strip() and line != running.header]
    own = _OWN_ERRORS.get(failure.exit_code)
    message = _own_message(lines) if own else []
    if own and message:
        return own("\n".join([f"{stage.name}: {message[0]}", *message[1:], f"  log: {log}"])), message[0]
    if own is errors.DiskFull or _is_of_full_disk(lines, work):  # the log itself found no room
        return errors.DiskFull(f"{stage.name}: {disk_full(work)}\n  log: {log}"), "no space is left on the disk"
    absent = re.match(r"ModuleNotFoundError: No module named '(?!trainwright)([\w.]+)'", lines[-1]) if lines else None
    if absent:
        error = missing_package(stage, absent[1])
        return errors.MissingExtra(f"{error}\n  log: {log}"), f"the package {absent[1]} is not installed"
    note = _blame(stage, failure)
    end = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])
    kind = errors.RankKilled if failure.exit_code < 0 else errors.StageFailed
    seen = f"; its log ends so:\n{end}\n  log: {log}" if end else f"; its log is empty: {log}"
    return kind(f"{stage.name}: {note}{seen}"), note


def _own_message(lines: list[str]) -> list[str]:
    """What the last `error: ` and the indented lines below it say; empty where there is none."""
    said = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    if not said:
        return []
    message = [lines[said[-1]].removeprefix("error: ")]
    for line in lines[said[-1] + 1 :]:
        if not line.startswith(" "):
            break
        message.append(line)
    return message


def _is_of_full_disk(lines: list[str], work: Path) -> bool:
    if any(says_disk_full(line) for line in lines[-TAIL_LINES:]):
        return True
    free = free_bytes(work)
    return free is not None and free < LITTLE_BYTES


def _blame(stage: Stage, failure: Failure) -> str:
    who = "torchrun" if failure.rank < 0 else f"rank {failure.rank} of {stage.processes_per_node}"
    if failure.exit_code >= 0:
        return f"{who} ended with exit code {failure.exit_code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-failure.exit_code).name
        hint = " (often the out-of-memory killer: see dmesg)" if name == "SIGKILL" else ""
        return f"{who} was killed by {name}{hint}"
    return f"{who} was killed by signal {-failure.exit_code}"
