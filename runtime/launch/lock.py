"""The lock that keeps two runs from one work folder, and what a killed run may have left in it: its lock's text, processes.

Two files, both locked with flock(2), which the kernel undoes when the last process that has the file open is gone:
`run.lock` by the runner, exclusively; `processes.lock` by every process of a stage (child.py), shared. A process that a stage
forked has the latter open too, so the lock tells of it even where nobody's death reached it.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from trainwright.runtime.disk import unusable_work
from trainwright.runtime.errors import BundleBusy, BundleError
from trainwright.runtime.manifest import ManifestError, read_record

LOCK_FILE = "run.lock"
PROCESSES_FILE = "processes.lock"
GLANCES, GLANCE_S = 10, 0.05  # `status` takes the lock for a moment to look: that is no other run
PATIENCE_S = 1.0  # that the processes of an earlier attempt have for dying by themselves
WAIT_S = 60.0  # and after SIGKILL: a process that waits for a file system dies late


@dataclass(frozen=True)
class Holder:
    """The runner that locked a work folder. `pid` 0: its lock file says nothing (yet)."""

    pid: int = 0
    host: str = ""
    since: str = ""  # ISO 8601, UTC

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}" if self.pid else "unknown process"


@dataclass(frozen=True)
class Lock:
    """A work folder that this process holds. `left_by`: the runner that was killed while it held it, if one was."""

    work: Path
    left_by: Holder | None
    _file: IO[bytes]

    def check(self) -> None:
        """Raises BundleError where the folder was deleted or moved meanwhile: what is written there would be lost."""
        if not _is_same(self._file, self.work / LOCK_FILE):
            raise BundleError(
                f"{self.work}: was deleted or moved while a run was executing there; its processes were stopped. Put the"
                " folder back to go on from it, or run again to begin anew"
            )


@contextlib.contextmanager
def lock_work(work: Path) -> Iterator[Lock]:
    """Hold `work`, which is made if need be, for this process.

    Raises BundleBusy while another process holds it, BundleError where it cannot be made or written to, DiskFull.
    """
    with unusable_work(work):
        work.mkdir(parents=True, exist_ok=True)
        file = _take(work)
    with file:
        left = _read_holder(file)
        with unusable_work(work):
            file.truncate(0)
            file.write(json.dumps(asdict(Holder(os.getpid(), socket.gethostname(), now()))).encode())
        try:
            yield Lock(work, left if left.pid else None, file)
        finally:  # a lock file with a text and no lock is a killed runner's
            with contextlib.suppress(OSError):
                file.truncate(0)


def _take(work: Path) -> IO[bytes]:
    holder = Holder()
    for _ in range(GLANCES):
        file = (work / LOCK_FILE).open("a+b", buffering=0)  # nothing to flush where the disk is full
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(file, work / LOCK_FILE):  # nobody deleted it between the two calls
                return file
        except BlockingIOError:
            holder = _read_holder(file)
        except BaseException:
            file.close()
            raise
        file.close()
        time.sleep(GLANCE_S)
    raise BundleBusy(f"{work}: another run is executing there ({holder}); wait for it, stop it, or use another --work")


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _read_holder(file: IO[bytes]) -> Holder:
    file.seek(0)
    try:
        return read_record(Holder, json.loads(file.read()))
    except (ManifestError, ValueError, RecursionError):
        return Holder()


def find_holder(work: Path) -> Holder | None:
    """The runner that is executing in `work` now; None for none. Raises BundleError where that cannot be read."""
    with unusable_work(work):
        try:
            file = (work / LOCK_FILE).open("rb")
        except FileNotFoundError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read_holder(file)
    return None


def end_survivors(work: Path, say: Callable[[str], None]) -> None:
    """Return when no process of an earlier attempt is left; those that do not end by themselves are killed, and `say` says so.

    Call it while holding `work`. Raises BundleBusy where some are out of reach: on another host, or in the kernel.
    """
    begun = time.monotonic()
    killed: set[int] = set()
    with unusable_work(work), (work / PROCESSES_FILE).open("a+b") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            waited_s = time.monotonic() - begun
            left = _lock_holders(file) if waited_s > PATIENCE_S else []
            if new := [pid for pid in left if pid not in killed]:
                say(f"processes of an earlier attempt are left and are ended: {', '.join(map(str, new))}")
                killed.update(new)
                for pid in new:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
            if waited_s > WAIT_S:
                which = f"processes {', '.join(map(str, left))}" if left else "a process, on another host perhaps,"
                raise BundleBusy(
                    f"{work}: {which} of an earlier run still use it (they hold {PROCESSES_FILE}); end them, or use"
                    " another --work"
                )
            time.sleep(GLANCE_S)


def _lock_holders(file: IO[bytes]) -> list[int]:
    """Other processes of this host that hold a lock on `file` (Linux: /proc; elsewhere none are found)."""
    wanted, found = os.fstat(file.fileno()), []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if int(entry.name) == os.getpid():
                continue
            for opened in (entry / "fd").iterdir():
                if os.path.samestat(opened.stat(), wanted) and "FLOCK" in (entry / "fdinfo" / opened.name).read_text():
                    found.append(int(entry.name))
                    break
    return sorted(found)


def now() -> str:
    """The time as `run.lock` and `state.json` write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
