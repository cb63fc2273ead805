"""What is known of each stage, in `work/state.json`."""

import contextlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from trainwright.runtime.disk import unusable_work
from trainwright.runtime.errors import BundleError
from trainwright.runtime.launch.lock import now
from trainwright.runtime.manifest import ManifestError, read_record
from trainwright.runtime.workspace import write_json

STATE_FILE = "state.json"


@dataclass(frozen=True)
class StageState:
    """One stage. `program_id` and `inputs` are those of the last attempt; `output_id` is set when it is done."""

    state: str = "pending"  # "pending" | "running" | "done" | "failed" | "interrupted"
    attempts: int = 0
    # Of the last attempt; negative: the signal; null while it runs and after an interruption. 0 while "running": the program has
    # ended well, and its output is being identified.
    exit_code: int | None = None
    program_id: str = ""
    inputs: dict[str, str] = field(default_factory=dict)  # by "stage:<name>", path as written, or "connector:<name>"
    output_id: str = ""
    started: str = ""  # ISO 8601, UTC
    ended: str = ""
    duration_s: float = 0.0  # of the attempts since the stage last began afresh
    note: str = ""  # why it failed, in a few words


@dataclass(frozen=True)
class _File:
    """What `state.json` holds, apart from the `run_id` that is there for people."""

    stages: dict[str, StageState]


class RunState:
    """`state.json`, held in memory and replaced whole at each change."""

    def __init__(self, work: Path, run_id: str) -> None:
        """Raises BundleError where the file is there and cannot be read, or `work` is no folder.

        So does every change where it cannot be written, or DiskFull: the file then says what it said before.
        """
        self._path, self._run_id = work / STATE_FILE, run_id
        self._stages: dict[str, StageState] = {}
        try:
            with unusable_work(work), contextlib.suppress(FileNotFoundError):
                self._stages = read_record(_File, json.loads(self._path.read_text(encoding="utf-8"))).stages
        except (ManifestError, ValueError, RecursionError) as error:
            raise BundleError(f"{self._path}: is damaged ({error}); delete it, and every stage runs again") from error

    def __getitem__(self, name: str) -> StageState:
        return self._stages.get(name, StageState())

    def _write(self, name: str, state: StageState) -> None:
        self._stages[name] = state
        stages = {key: asdict(value) for key, value in self._stages.items()}
        with unusable_work(self._path.parent):
            write_json(self._path, {"run_id": self._run_id, "stages": stages})

    def begin(self, name: str, attempt: int, program_id: str, inputs: dict[str, str], spent_s: float) -> None:
        """An attempt has started; `spent_s`: seconds of the attempts that it resumes."""
        started = StageState("running", attempt, None, program_id, inputs, started=now(), duration_s=round(spent_s, 3))
        self._write(name, started)

    def program_ended(self, name: str, duration_s: float) -> None:
        """The program ended without an error. To identify what it left may take long, and a kill meanwhile must not cost it."""
        self._write(name, replace(self[name], exit_code=0, duration_s=round(duration_s, 3)))

    def end(self, name: str, state: str, duration_s: float, **changes: object) -> None:
        """The attempt is over; `changes`: further fields."""
        ended = {"state": state, "duration_s": round(duration_s, 3), "ended": now(), **changes}
        self._write(name, replace(self[name], **ended))  # type: ignore[arg-type]  # replace() checks names at run time

    def stale(self) -> list[str]:
        """Stages left "running" by a runner that was killed, or found no room to write more. Call it while holding the lock."""
        return [name for name, stage in self._stages.items() if stage.state == "running"]

    def interrupt(self, name: str, note: str) -> None:
        """A stale stage is known to have been interrupted."""
        self._write(name, replace(self[name], state="interrupted", exit_code=None, note=note))
