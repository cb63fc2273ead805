"""From the command to the first step of an emitted program: how long it takes, and where the time goes.

    python benchmarks/startup.py [--runs 3] [--processes 1 2]

Times the lines that the program prints as they come, under torchrun as launchers start it, and the imports alone in processes of
their own. The bar is 25 s to the end of the first step on two free cores. Prints the median of the runs.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from emitted import prepare, spec_of, start_program, stop

# What the program prints first, once a phase is over.
MARKS = {
    "torchrun, imports, process groups": "platform ",
    "model and optimizer": "parameters: ",
    "data: indices of the samples; first step": "step 1/",
}
IMPORTS = ("torch", "megatron.core", "trainwright.runtime.stages.pretrain")


def first_step(bundle: Path, processes: int) -> dict[str, float]:
    """Seconds of each phase of one start, by its name in MARKS."""
    (program,) = bundle.glob("*_pretrain.py")
    started = previous = time.monotonic()
    process = start_program(program, processes, output=subprocess.PIPE)
    phases: dict[str, float] = {}
    try:
        assert process.stdout is not None
        waiting = list(MARKS.items())
        for line in process.stdout:
            if waiting and line.decode(errors="replace").startswith(waiting[0][1]):
                now = time.monotonic()
                phases[waiting.pop(0)[0]] = now - previous
                previous = now
            if not waiting:
                break
        else:
            raise SystemExit(f"{program} ended before its first step")
    finally:
        stop(process)
    return phases | {"in all": previous - started}


def import_s(module: str) -> float:
    """Seconds of a process that imports one module and ends."""
    started = time.monotonic()
    subprocess.run((sys.executable, "-c", f"import {module}"), check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    for module in IMPORTS:
        seconds = statistics.median(import_s(module) for _ in range(given.runs))
        print(f"import {module}, a process of its own: {seconds:.1f} s")
    with tempfile.TemporaryDirectory() as scratch:
        first: Path | None = None
        for processes in given.processes:
            bundle = prepare(Path(scratch) / f"of-{processes}", spec_of(processes), like=first)
            first = first or bundle
            runs = [first_step(bundle, processes) for _ in range(given.runs)]
            print(f"{processes} process(es):")
            for phase in runs[0]:
                print(f"  {phase}: {statistics.median(run[phase] for run in runs):.1f} s")


if __name__ == "__main__":
    main()
