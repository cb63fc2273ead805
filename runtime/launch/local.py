"""The local backend: starts a stage's processes on this machine, waits for them, stops them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainwright.runtime import errors
from trainwright.runtime.disk import unusable_work
from trainwright.runtime.launch.lock import PROCESSES_FILE
from trainwright.runtime.manifest import Stage
from trainwright.runtime.workspace import DATA_ROOT_VARIABLE, WORK_VARIABLE, Workspace

FAILURES_FILE = "failures.json"  # torchrun.py writes it; named again here because that module imports torch
POLL_S = 0.2  # how often a running stage is looked at
GRACE_S = 45.0  # from SIGTERM to SIGKILL; torchrun's agent itself gives its ranks 30 s


@dataclass(frozen=True)
class Running:
    """A stage whose processes have been started. `log_starts`: by log file, where this attempt's part begins."""

    stage: Stage
    process: subprocess.Popen[bytes]
    logs: Path
    header: str
    log_starts: dict[str, int]


def check_port(port: int) -> None:
    """Raises PortInUse when a process of this machine listens on the TCP port."""
    # torch's store listens on every address. Dual-stack listeners also block the IPv4 probe, so that one is enough.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store does: connections that linger from an earlier run are no obstacle, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except (OSError, OverflowError) as error:
            raise errors.PortInUse(
                f"port {port} cannot be used ({getattr(error, 'strerror', None) or error}); leave --port out (a free one"
                f" is picked), give another, or see who holds it: ss -ltnp 'sport = :{port}'"
            ) from None


def launch_stage(bundle: Path, stage: Stage, workspace: Workspace, port: int, header: str) -> Running:
    """Start the stage's processes. `port` 0: a free one. `header` is the line that begins this attempt in each log.

    Raises PortInUse, and BundleError or DiskFull where the work folder takes no logs.
    """
    logs = workspace.stage(stage.name).log
    with unusable_work(workspace.work):
        logs.mkdir(parents=True, exist_ok=True)
        (logs / FAILURES_FILE).unlink(missing_ok=True)
    program = str((bundle / stage.program).resolve())
    lock = str(workspace.work / PROCESSES_FILE)
    # -P: no module of the current folder
    child = [sys.executable, "-P", "-m", "trainwright.runtime.launch.child", str(os.getpid()), lock]
    if stage.launcher == "torchrun":
        if port:
            check_port(port)
        agent = [sys.executable, "-P", "-m", "trainwright.runtime.launch.torchrun"]
        agent += [str(stage.processes_per_node), str(port), lock, str(logs), header, program]
        command = [*child, str(logs / "torchrun.log"), header, *agent]
    else:
        command = [*child, str(logs), header, sys.executable, program]
    log_starts = {file.name: file.stat().st_size for file in logs.glob("*.log")}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env=_environment(stage, workspace),
        start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends the stage in order
    )
    return Running(stage, process, logs, header, log_starts)


# What imports of Megatron-Core 0.16 say where it does without Transformer Engine and Apex (a stage's own first line says what
# that changes).
_EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)


def _environment(stage: Stage, workspace: Workspace) -> dict[str, str]:
    # A runner that was itself started by torchrun or SLURM has its own rank; a stage's processes get theirs here.
    inherited = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    environment[WORK_VARIABLE] = str(workspace.work)
    environment[DATA_ROOT_VARIABLE] = str(workspace.data_root)
    environment.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{message}" for message in _EXPECTED_WARNINGS))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # a log that is up to date when the process is killed
    environment.setdefault(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1"
    )  # Megatron-Core: collectives start in the order they were issued
    # As torchrun does for several processes: each with a thread per core would fight for the cores.
    threads = 1 if stage.processes_per_node > 1 else num_cores()
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def wait_stage(running: Running, each_poll: Callable[[], None]) -> int:
    """The exit code of the stage's first process (negative: the signal). Calls `each_poll` while it waits."""
    while True:
        try:
            return running.process.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            each_poll()


def stop_stage(running: Running) -> None:
    """End the stage's processes: SIGTERM, then SIGKILL after GRACE_S or at another Ctrl-C."""
    group = running.process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            running.process.wait(timeout=GRACE_S)
        os.killpg(group, signal.SIGKILL)  # what ignored it; the ranks, groups of their own, die with the agent
    running.process.wait()
