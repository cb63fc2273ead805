"""Becomes a stage's process: `python -P -m trainwright.runtime.launch.child PARENT LOCK LOG_FOLDER HEADER COMMAND...`.

Holds the file LOCK, shared, for as long as this process or one that it forks lives; asks the kernel to kill this process when
PARENT, a process id, dies; appends stdout and stderr to `LOG_FOLDER/rank-<n>.log` below a header line (n from `RANK`, 0
without; `LOG_FOLDER` may also be a `.log` file); replaces itself by COMMAND. Standard library only.
"""

import contextlib
import fcntl
import os
import sys
from pathlib import Path

from trainwright.runtime.disk import is_disk_full
from trainwright.runtime.errors import DiskFull
from trainwright.runtime.processes import die_with


def hold(lock: str) -> None:
    """Lock the file for this process, what it becomes by exec, and what it forks."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(file, fcntl.LOCK_SH)  # waits while the runner looks whether anybody is left
    os.set_inheritable(file, True)


def log_to(target: str, header: str) -> None:
    """Let stdout and stderr go to the end of the process's log, below `header`."""
    log = Path(target) if target.endswith(".log") else Path(target) / f"rank-{os.environ.get('RANK', '0')}.log"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    with contextlib.suppress(OSError):  # a full disk is for the stage to tell
        os.write(file, f"{header}\n".encode())
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def main() -> None:
    parent, lock, target, header, *command = sys.argv[1:]
    try:
        # In this order: whoever finds the lock free afterwards may be sure that this process dies with its parent.
        hold(lock)
        die_with(int(parent))
        log_to(target, header)
    except OSError as error:  # stderr is still the runner's
        if is_disk_full(error):
            sys.exit(DiskFull.exit_code)
        sys.exit(f"{error.filename or target}: {error.strerror}")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
