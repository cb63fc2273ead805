"""The processes that Megatron-Core forks to write a checkpoint: neither outlives the other, the rank or its writers.

Megatron-Core 0.16 waits until each of its writers has answered by a queue (filesystem_async.py, `count_queue.join()`). One that
the out-of-memory killer has picked never does: the rank, and with it the run, would wait for ever. The writers of a rank that was
killed wait as well, for locks that it held, and would meet the next attempt's.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import psutil

from trainwright.runtime.errors import RankKilled
from trainwright.runtime.processes import die_with

LOOK_EVERY_S = 0.5
_rank = 0  # this process, while it writes a checkpoint; 0 else, and in what it has forked


def _in_fork() -> None:
    global _rank
    rank, _rank = _rank, 0
    if rank:
        die_with(rank)


os.register_at_fork(after_in_child=_in_fork)


@contextlib.contextmanager
def writers_watched() -> Iterator[None]:
    """What this process forks in the block dies with it; one that is killed by a signal ends this process too, with a message."""
    global _rank
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over,), daemon=True)
    thread.start()
    _rank = os.getpid()
    try:
        yield
    finally:
        _rank = 0
        over.set()
        thread.join()


def _watch(over: threading.Event) -> None:
    while not over.wait(LOOK_EVERY_S):
        for child in psutil.Process().children():
            number = _killed_by(child.pid)
            if number:
                sys.stdout.flush()
                name = signal.Signals(number).name
                print(
                    f"error: a process that wrote the checkpoint was killed by {name} (often the out-of-memory killer: see"
                    " dmesg); run again, it goes on from the checkpoint before",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(RankKilled.exit_code)


def _killed_by(pid: int) -> int:
    """The signal that ended the child; 0 where it lives or ended by itself. It stays to be waited for."""
    with contextlib.suppress(ChildProcessError):
        status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if status and status.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            return status.si_status
    return 0
