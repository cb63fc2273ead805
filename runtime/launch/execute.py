"""Executes a bundle: stage after stage, each only if it is not done."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from trainwright.runtime.errors import DataError, RankKilled, RunError, StageFailed, Unsupported
from trainwright.runtime.launch.bundle import Bundle, choose_stages
from trainwright.runtime.launch.failure import find_failure, stage_error
from trainwright.runtime.launch.identity import (
    Hashes,
    changed_input,
    inputs_of,
    missing_outputs,
    output_id,
    reason_to_run,
    require_inputs,
)
from trainwright.runtime.launch.local import Running, check_port, launch_stage, stop_stage, wait_stage
from trainwright.runtime.launch.lock import Lock, end_survivors, lock_work, now
from trainwright.runtime.launch.packages import require_packages
from trainwright.runtime.launch.previous import delete_old, set_aside
from trainwright.runtime.launch.show import Show
from trainwright.runtime.launch.state import RunState
from trainwright.runtime.manifest import Stage
from trainwright.runtime.reading import format_duration, read_json
from trainwright.runtime.workspace import Workspace, remove_scratch

PAUSE_S, LONGEST_PAUSE_S = 2.0, 120.0  # before the first retry of a stage, doubled with each; at most


def execute(
    bundle: Bundle,
    workspace: Workspace,
    show: Show,
    *,
    only: Sequence[str] = (),
    start: str = "",
    port: int = 0,
    retries: int | None = None,
) -> None:
    """Run the chosen stages that are not done, in order. Raises a RunError at the first one that fails.

    `retries`: of each stage, in place of the manifest's. Raises BundleBusy, BundleError, DataError, MissingExtra, PortInUse or
    Unsupported before anything has been started. KeyboardInterrupt passes through, after the running stage's processes were
    ended and its state was written.
    """
    chosen, forced = choose_stages(bundle, only, start)
    _require_runnable(bundle, workspace, chosen, port)
    with lock_work(workspace.work) as lock:
        if lock.left_by:
            show.say(f"an earlier run was killed: {lock.left_by}")
        end_survivors(workspace.work, show.say)
        remove_scratch(workspace.work)
        state = RunState(workspace.work, bundle.manifest.run_id)
        run = _Run(bundle, workspace, show, state, Hashes(workspace.work), lock, port, retries)
        run.release_stale()
        require_packages(stage for stage in chosen if stage.name in forced or state[stage.name].state != "done")
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
    lock: Lock
    port: int
    retries: int | None

    def release_stale(self) -> None:
        """What a killed runner left "running": done where only the note of it is missing, else interrupted."""
        stages = {stage.name: stage for stage in self.bundle.stages}
        for name in self.state.stale():
            stage, folder = stages.get(name), self.workspace.stage(name)
            if stage and self.state[name].exit_code == 0 and not missing_outputs(stage, folder):
                self._complete(stage, self.state[name].duration_s)
            else:
                # A lock that was left in order is of a run that ended by itself, and could not write on a full disk.
                how = (
                    "was killed while this stage was running"
                    if self.lock.left_by
                    else "could not note how this stage ended"
                )
                self.show.say(f"{name}: an earlier run {how}")
                self.state.interrupt(name, f"an earlier run {how}")

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
                    note = f": {self.state[need].note}" if self.state[need].note else ""
                    what = f"its {missing[0]} is gone" if state == "done" else f"it is {state}{note}"
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
        require_packages([stage])
        # A done stage whose program alone changed may still find its checkpoints: another layout resumes them, and a stage
        # that trains something else knows by its run_id.
        afresh = before.attempts > 0 and (forced != "" or changed_input(before.inputs, inputs) != "")
        attempt = _Attempt(before.attempts + 1, program_id, inputs, afresh, replaces=before.state == "done")
        if before.attempts == 0:
            self.show.say(f"{stage.name}: runs")
        else:
            self.show.say(f"{stage.name}: {'runs again' if afresh or attempt.replaces else 'goes on'}: {reason}")
        result = self._until_done(stage, attempt)
        self.hashes.save()
        used = [self.workspace.data_root / text for other in self.bundle.stages for text in other.inputs]
        for path in delete_old(folder, used):
            self.show.say(f"{stage.name}: deleted {path}, which newer ones have replaced")
        return result

    def _until_done(self, stage: Stage, attempt: _Attempt) -> str:
        """The output id, after as many attempts as failures allow that are nobody's mistake."""
        retries = stage.retries if self.retries is None else self.retries
        failures = 0
        while True:
            try:
                return self._attempt(stage, attempt)
            except (RankKilled, StageFailed):
                failures += 1
                if failures > retries:
                    raise
            pause_s = min(PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
            self.show.finish(ended=False)
            self.show.say(
                f"{stage.name}: failed ({self.state[stage.name].note}); starts again in {format_duration(pause_s)}"
                f" (retry {failures} of {retries})"
            )
            time.sleep(pause_s)
            attempt = replace(attempt, number=attempt.number + 1, afresh=False, replaces=False)

    def _attempt(self, stage: Stage, attempt: _Attempt) -> str:
        folder, spent_s = self.workspace.stage(stage.name), self.state[stage.name].duration_s
        if attempt.afresh or attempt.replaces:
            spent_s = 0.0
            kept = set_aside(folder, attempt.number - 1, all_of_it=attempt.afresh)
            if kept:
                self.show.say(f"{stage.name}: what it left before is kept in {kept}")
        self.lock.check()
        end_survivors(self.workspace.work, self.show.say)  # of the attempt before: its ranks' own processes
        remove_scratch(folder.path)
        folder.progress.unlink(missing_ok=True)
        header = f"=== {stage.name}: attempt {attempt.number}, {now()}"
        begun = time.monotonic() - spent_s
        running = launch_stage(self.bundle.path, stage, self.workspace, self.port, header)
        try:
            self.state.begin(stage.name, attempt.number, attempt.program_id, attempt.inputs, spent_s)
            self.show.start(stage.name, folder)
            exit_code = wait_stage(running, self._poll)
            self.lock.check()
        except KeyboardInterrupt:
            self.show.say(f"{stage.name}: is being stopped (Ctrl-C again: at once)")
            stop_stage(running)
            self.state.end(stage.name, "interrupted", time.monotonic() - begun, note="stopped by a signal")
            raise
        except BaseException:  # the work folder is gone, the disk is full, the terminal is closed
            stop_stage(running)
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
        self.state.program_ended(stage.name, spent_s)
        return self._complete(stage, spent_s)

    def _poll(self) -> None:
        self.lock.check()
        self.show.poll()

    def _complete(self, stage: Stage, spent_s: float) -> str:
        """The program has left its output: identify it, and the stage is done."""
        folder = self.workspace.stage(stage.name)
        result = output_id(folder, self.hashes)
        self.state.end(stage.name, "done", spent_s, exit_code=0, output_id=result)
        key_figure = str(read_json(folder.summary).get("key_figure", ""))
        self.show.say(f"{stage.name}: done in {format_duration(spent_s)}" + (f": {key_figure}" if key_figure else ""))
        return result

    def _raise_failure(self, running: Running, exit_code: int, spent_s: float) -> NoReturn:
        failure = find_failure(running, exit_code)
        error, note = stage_error(running, failure, self.workspace.work)
        with contextlib.suppress(RunError):  # a disk that is full for the state as well: `error` says more
            self.state.end(running.stage.name, "failed", spent_s, exit_code=failure.exit_code, note=note)
        raise error
