"""Executes a bundle: stage after stage, each only if it is not done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trainwright.runtime.errors import DataError, RunError, StageFailed, Unsupported
from trainwright.runtime.launch.bundle import Bundle, choose_stages
from trainwright.runtime.launch.identity import (
    Hashes,
    changed_input,
    inputs_of,
    missing_outputs,
    output_id,
    reason_to_run,
    require_inputs,
)
from trainwright.runtime.launch.local import (
    Running,
    blame,
    check_port,
    find_failure,
    launch_stage,
    stage_error,
    stop_stage,
    wait_stage,
)
from trainwright.runtime.launch.show import Show
from trainwright.runtime.launch.state import RunState, lock_work, now
from trainwright.runtime.manifest import Stage
from trainwright.runtime.reading import format_duration, read_json
from trainwright.runtime.workspace import StageFolder, Workspace


def execute(
    bundle: Bundle, workspace: Workspace, show: Show, *, only: Sequence[str] = (), start: str = "", port: int = 0
) -> None:
    """Run the chosen stages that are not done, in order. Raises a RunError at the first one that fails.

    Raises BundleBusy, BundleError, DataError, PortInUse or Unsupported before anything has been started. KeyboardInterrupt passes
    through, after the running stage's processes were ended and its state was written.
    """
    chosen, forced = choose_stages(bundle, only, start)
    _require_runnable(bundle, workspace, chosen, port)
    with lock_work(workspace.work):
        state = RunState(workspace.work, bundle.manifest.run_id)
        for name in state.release_stale():
            show.say(f"{name}: an earlier run was killed while this stage was running")
        run = _Run(bundle, workspace, show, state, Hashes(workspace.work), port)
        outputs = run.outputs_of_others(chosen)
        for stage in chosen:
            outputs[stage.name] = run.bring_up_to_date(
                stage, outputs, f"--from {start}" if stage.name in forced else ""
            )
            show.finish(ended=True)


def _require_runnable(bundle: Bundle, workspace: Workspace, chosen: Sequence[Stage], port: int) -> None:
    for stage in chosen:
        if stage.nodes > 1:
            raise Unsupported(
                f"{stage.name}: is for {stage.nodes} nodes of {stage.processes_per_node} processes; start"
                f" {bundle.path / 'launch.sh'} on each of them (stages for one node can be run here: --only NAME)"
            )
    for stage in chosen:
        bundle.program_id(stage)
        require_inputs(stage, workspace.data_root)
    if port:
        check_port(port)


@dataclass(frozen=True)
class _Attempt:
    number: int
    program_id: str
    inputs: dict[str, str]
    afresh: bool  # nothing of earlier attempts may be resumed
    replaces: bool  # an earlier attempt was done: its output is not this one's


@dataclass(frozen=True)
class _Run:
    """One call of `execute`, with the work folder locked."""

    bundle: Bundle
    workspace: Workspace
    show: Show
    state: RunState
    hashes: Hashes
    port: int

    def outputs_of_others(self, chosen: Sequence[Stage]) -> dict[str, str]:
        """Output ids of stages that chosen ones need and that are not chosen. Raises DataError where one is not done."""
        names = {stage.name for stage in chosen}
        found: dict[str, str] = {}
        for stage in chosen:
            for need in set(stage.needs) - names:
                other = next(item for item in self.bundle.stages if item.name == need)
                folder, state = self.workspace.stage(need), self.state[need].state
                missing = missing_outputs(other, folder)
                if state != "done" or missing:
                    what = f"its {missing[0]} is gone" if state == "done" else f"it is {state}"
                    raise DataError(
                        f"{stage.name}: needs stage {need}, which is not done ({what}); run that first: --only {need}"
                    )
                found[need] = output_id(folder, self.hashes)
        return found

    def bring_up_to_date(self, stage: Stage, outputs: dict[str, str], forced: str) -> str:
        """Run the stage unless it is done; its output id. `forced`: why it runs even then, or ""."""
        before, program_id = self.state[stage.name], self.bundle.program_id(stage)
        inputs = inputs_of(stage, outputs, self.workspace.data_root, self.hashes)
        folder = self.workspace.stage(stage.name)
        reason = forced or reason_to_run(stage, before, program_id, inputs, folder, self.hashes)
        self.hashes.save()  # reading a corpus takes long; a failure later must not cost it again
        if not reason:
            self.show.say(f"{stage.name}: unchanged, done at {before.ended}")
            return before.output_id
        # A done stage whose program alone changed may still find its checkpoints: another layout resumes them, and a stage
        # that trains something else knows by its run_id.
        afresh = before.attempts > 0 and (forced != "" or changed_input(before.inputs, inputs) != "")
        attempt = _Attempt(before.attempts + 1, program_id, inputs, afresh, replaces=before.state == "done")
        if before.attempts == 0:
            self.show.say(f"{stage.name}: runs")
        else:
            self.show.say(f"{stage.name}: {'runs again' if afresh or attempt.replaces else 'goes on'}: {reason}")
        result = self._attempt(stage, attempt)
        self.hashes.save()
        return result

    def _attempt(self, stage: Stage, attempt: _Attempt) -> str:
        folder, spent_s = self.workspace.stage(stage.name), self.state[stage.name].duration_s
        if attempt.afresh or attempt.replaces:
            spent_s = 0.0
            kept = set_aside(folder, attempt.number - 1, all_of_it=attempt.afresh)
            if kept:
                self.show.say(f"{stage.name}: what it left before is kept in {kept}")
        folder.progress.unlink(missing_ok=True)
        header = f"=== {stage.name}: attempt {attempt.number}, {now()}"
        begun = time.monotonic() - spent_s
        running = launch_stage(self.bundle.path, stage, self.workspace, self.port, header)
        try:
            self.state.begin(stage.name, attempt.number, attempt.program_id, attempt.inputs, spent_s)
            self.show.start(stage.name, folder)
            exit_code = wait_stage(running, self.show.poll)
        except KeyboardInterrupt:
            self.show.say(f"{stage.name}: is being stopped (Ctrl-C again: at once)")
            stop_stage(running)
            self.state.end(stage.name, "interrupted", time.monotonic() - begun, note="stopped by a signal")
            raise
        spent_s = time.monotonic() - begun
        if exit_code != 0:
            self._raise_failure(running, exit_code, spent_s)
        missing = missing_outputs(stage, folder)
        if missing:
            note = f"it left no {missing[0]}"
            self.state.end(stage.name, "failed", spent_s, exit_code=0, note=note)
            log = running.logs / "rank-0.log"
            raise StageFailed(f"{stage.name}: its program ended without an error, but {note}; see {log}")
        result = output_id(folder, self.hashes)
        self.state.end(stage.name, "done", spent_s, exit_code=0, output_id=result)
        key_figure = str(read_json(folder.summary).get("key_figure", ""))
        self.show.say(f"{stage.name}: done in {format_duration(spent_s)}" + (f": {key_figure}" if key_figure else ""))
        return result

    def _raise_failure(self, running: Running, exit_code: int, spent_s: float) -> NoReturn:
        failure = find_failure(running, exit_code)
        error: RunError = stage_error(running, failure)
        note = blame(running.stage, failure)
        self.state.end(running.stage.name, "failed", spent_s, exit_code=failure.exit_code, note=note)
        raise error


def set_aside(folder: StageFolder, attempt: int, *, all_of_it: bool) -> Path | None:
    """Move what earlier attempts left to `previous-<attempt>/`: the output, or all but the logs. That folder, or None where
    there was nothing.

    A program resumes what it finds. It must not find the work on other inputs, nor may that be lost.
    """
    if not folder.path.is_dir():
        return None
    names = sorted(path.name for path in folder.path.iterdir())
    stays = [folder.log.name] if all_of_it else [name for name in names if name != folder.output.name]
    found = [name for name in names if name not in stays and not name.startswith("previous-")]
    if not found:
        return None
    number = attempt
    while (
        target := folder.path / f"previous-{number}"
    ).exists():  # attempts are counted anew where state.json was deleted
        number += 1
    target.mkdir()
    for name in found:
        (folder.path / name).rename(target / name)
    return target
