"""Processes that die with the one that started them. Standard library only."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """SIGKILL for this process as soon as its parent, the process `parent`, is gone, whatever ended that; survives exec.

    The kernel means the thread that started this process: it must be one that lives as long as the parent. Outside Linux this
    only looks whether the parent is there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)
