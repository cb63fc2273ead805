"""What is known of a bundle's run, while it runs and after: read from disk, nothing is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trainwright.runtime.launch.bundle import Bundle
from trainwright.runtime.launch.identity import Hashes, inputs_of, output_id, reason_to_run
from trainwright.runtime.launch.lock import Holder, find_holder
from trainwright.runtime.launch.state import RunState, StageState
from trainwright.runtime.manifest import Stage
from trainwright.runtime.reading import read_json
from trainwright.runtime.workspace import Workspace


@dataclass(frozen=True)
class Progress:
    """How far a stage is, or was when it ended."""

    done: int
    total: int
    unit: str

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.unit}"


@dataclass(frozen=True)
class StageStatus:
    """One stage, as `status --json` prints it (docs/reference/files.md)."""

    name: str
    kind: str
    state: str
    attempts: int
    exit_code: int | None
    started: str
    ended: str
    duration_s: float  # of the running attempt up to now
    note: str
    progress: Progress | None
    key_figure: str  # of a stage that is done
    would_run: str | None  # why `run` would run it; "" where it would not; None while a run is executing


@dataclass(frozen=True)
class Status:
    """A bundle's run."""

    name: str
    run_id: str
    work: str
    locked: bool
    runner: Holder | None
    stages: tuple[StageStatus, ...]


def read_status(bundle: Bundle, workspace: Workspace, *, reasons: bool) -> Status:
    """`reasons`: find `would_run` as well, which reads inputs and outputs whose hashes are not known yet.

    Raises BundleError where the work folder cannot be read, DataError where an input cannot.
    """
    runner = find_holder(workspace.work)
    state = RunState(workspace.work, bundle.manifest.run_id)
    why: Mapping[str, str] = _reasons(bundle, workspace, state) if reasons and runner is None else {}
    stages = tuple(_stage(stage, workspace, state[stage.name], runner, why.get(stage.name)) for stage in bundle.stages)
    return Status(
        name=bundle.manifest.name,
        run_id=bundle.manifest.run_id,
        work=str(workspace.work),
        locked=runner is not None,
        runner=runner,
        stages=stages,
    )


def read_progress(raw: Mapping[str, Any]) -> Progress | None:
    """What `progress.json` holds; None where that is nothing yet."""
    done, total = raw.get("done"), raw.get("total")
    if not isinstance(done, int) or not isinstance(total, int) or total < 1:
        return None
    return Progress(done, total, str(raw.get("unit", "")))


def _stage(
    stage: Stage, workspace: Workspace, now: StageState, runner: Holder | None, would_run: str | None
) -> StageStatus:
    folder, running = workspace.stage(stage.name), now.state == "running" and runner is not None
    # "running" with nobody there: the runner was killed, and its stages with it.
    word = "interrupted" if now.state == "running" and not running else now.state
    duration_s = now.duration_s
    if running and now.exit_code is None:
        duration_s += max(0.0, (datetime.now(UTC) - datetime.fromisoformat(now.started)).total_seconds())
    return StageStatus(
        name=stage.name,
        kind=stage.kind,
        state=word,
        attempts=now.attempts,
        exit_code=now.exit_code,
        started=now.started,
        ended=now.ended,
        duration_s=round(duration_s, 3),
        note=now.note,
        progress=read_progress(read_json(folder.progress)),
        key_figure=str(read_json(folder.summary).get("key_figure", "")) if now.state == "done" else "",
        would_run=would_run,
    )


def _reasons(bundle: Bundle, workspace: Workspace, state: RunState) -> dict[str, str]:
    """Why `run` would run each stage; "" for those that it would not."""
    hashes = Hashes(workspace.work)
    outputs: dict[str, str] = {}
    found: dict[str, str] = {}
    for stage in bundle.stages:
        folder = workspace.stage(stage.name)
        outputs[stage.name] = output_id(folder, hashes)
        inputs = inputs_of(stage, outputs, workspace.data_root, hashes)
        reason = reason_to_run(stage, state[stage.name], bundle.program_id(stage), inputs, folder, hashes)
        before = next((need for need in stage.needs if found[need]), "")
        found[stage.name] = reason or (f"if the output of {before} changes" if before else "")
    return found
