"""One node's ranks through torchrun's own agent: `... launch.torchrun PROCESSES PORT LOCK LOGS HEADER PROGRAM`.

A process of its own, because it imports torch. It differs from the `torchrun` command in this: each rank's output goes to one
file that later attempts append to, a rank dies with the agent, and failures are left as JSON for the runner.
Source of the settings: torch.distributed.launcher.api.LaunchConfig (torch 2.6 to 2.14).
"""

import json
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FAILURES_FILE = "failures.json"


def main() -> None:
    processes, port, lock, logs, header, program = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        run_id="trainwright",
        max_restarts=0,
        # "static" makes the port MASTER_PORT. Port 0: with "c10d" the kernel picks a free one as the agent's store binds it,
        # so that nobody can take it in between.
        rdzv_backend="c10d" if port == "0" else "static",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"is_host": True} if port == "0" else {"rank": 0},
        local_addr="127.0.0.1",  # a container's host name may resolve to nothing
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # child.py writes the logs
    )
    child = ("-P", "-m", "trainwright.runtime.launch.child", str(os.getpid()), lock, logs, header)
    try:
        elastic_launch(config, sys.executable)(*child, sys.executable, program)
    except ChildFailedError as error:
        # In the order in which they were seen; what the agent itself ended because of the first one comes with SIGTERM.
        failures = [{"rank": rank, "exit_code": failure.exitcode} for rank, failure in error.failures.items()]
        Path(logs, FAILURES_FILE).write_text(json.dumps(failures), encoding="utf-8")
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
