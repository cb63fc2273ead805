"""What is known of each stage, in `work/state.json`, and the lock that keeps two runs from one work folder."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from trainwright.runtime.errors import BundleBusy, BundleError
from trainwright.runtime.manifest import ManifestError, read_record
from trainwright.runtime.workspace import write_json

STATE_FILE = "state.json"
LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class StageState:
    """One stage. `program_id` and `inputs` are those of the last attempt; `output_id` is set when it is done."""

    state: str = "pending"  # "pending" | "running" | "done" | "failed" | "interrupted"
    attempts: int = 0
    exit_code: int | None = (
        None  # of the last attempt; negative: the signal; null while it runs and after an interruption
    )
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
        """Raises BundleError where the file is there and cannot be read, or `work` is no folder."""
        self._path, self._run_id = work / STATE_FILE, run_id
        self._stages: dict[str, StageState] = {}
        try:
            self._stages = read_record(_File, json.loads(self._path.read_text(encoding="utf-8"))).stages
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unusable(work, error) from error
        except (ManifestError, ValueError, RecursionError) as error:
            raise BundleError(f"{self._path}: is damaged ({error}); delete it, and every stage runs again") from error

    def __getitem__(self, name: str) -> StageState:
        return self._stages.get(name, StageState())

    def _write(self, name: str, state: StageState) -> None:
        self._stages[name] = state
        stages = {key: asdict(value) for key, value in self._stages.items()}
        write_json(self._path, {"run_id": self._run_id, "stages": stages})

    def begin(self, name: str, attempt: int, program_id: str, inputs: dict[str, str], spent_s: float) -> None:
        """An attempt has started; `spent_s`: seconds of the attempts that it resumes."""
        started = StageState("running", attempt, None, program_id, inputs, started=now(), duration_s=round(spent_s, 3))
        self._write(name, started)

    def end(self, name: str, state: str, duration_s: float, **changes: object) -> None:
        """The attempt is over; `changes`: further fields."""
        ended = {"state": state, "duration_s": round(duration_s, 3), "ended": now(), **changes}
        self._write(name, replace(self[name], **ended))  # type: ignore[arg-type]  # replace() checks names at run time

    def release_stale(self) -> list[str]:
        """Stages left "running" by a runner that was killed become "interrupted". Call it while holding the lock."""
        stale = [name for name, stage in self._stages.items() if stage.state == "running"]
        for name in stale:
            self._write(name, replace(self[name], state="interrupted", note="the runner was killed"))
        return stale


def now() -> str:
    """The time as `state.json` writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unusable(work: Path, error: OSError) -> BundleError:
    reason = error.strerror or str(error)
    if os.path.lexists(work) and not os.path.isdir(work):  # Path.is_dir raises where a parent may not be entered
        reason = "it is not a folder"
    elif error.filename and Path(error.filename) != work:
        reason = f"{error.filename}: {reason}"
    return BundleError(f"{work}: cannot be the work folder ({reason}); make it usable, or name another with --work")


@contextlib.contextmanager
def lock_work(work: Path) -> Iterator[None]:
    """Hold `work`, which is made if need be, for this process; the kernel frees it when that process ends.

    Raises BundleBusy while another process holds it, BundleError where it cannot be made or written to.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = (work / LOCK_FILE).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unusable(work, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BundleBusy(
                f"{work}: another run is executing there (process {holder}); wait for it, stop it, or use another --work"
            ) from None
        except OSError as error:  # a file system without locks
            raise _unusable(work, error) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(work: Path) -> bool:
    """Whether a run is executing in `work` now. Raises BundleError where that cannot be read."""
    try:
        with (work / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise _unusable(work, error) from error
    return False
