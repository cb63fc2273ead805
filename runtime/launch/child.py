"""Becomes a stage's process: `python -P -m trainwright.runtime.launch.child LOG_FOLDER HEADER COMMAND...`. Standard library only.

Appends stdout and stderr to `LOG_FOLDER/rank-<n>.log` below a header line (n from `RANK`, 0 without; `LOG_FOLDER` may also be a
`.log` file), asks the kernel to kill this process when its parent dies, and replaces itself by COMMAND.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """SIGKILL for this process as soon as its parent is gone, whatever ended that; survives exec. Does nothing outside Linux."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def main() -> None:
    target, header, *command = sys.argv[1:]
    die_with_parent()
    log = Path(target) if target.endswith(".log") else Path(target) / f"rank-{os.environ.get('RANK', '0')}.log"
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, f"{header}\n".encode())
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
