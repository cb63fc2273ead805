"""The fit of a scaling law beside the `chinchilla` package's, on the 240 runs of Besiroglu et al. 2024.

    TRAINWRIGHT_REFERENCE=DIR python benchmarks/fit_speed.py [--peer PYTHON] [--draws FILE]

The runs (arXiv 2404.10102: read from Hoffmann et al. 2022's figure 4; the 5 highest losses of 245 left out) are in the
reference folder; without one there is nothing to time. Both fits minimise the same objective on one core, timed by process
time. The peer lives in an environment of its own, because it pins what this project does not need:

    python -m venv build/peers/chinchilla && build/peers/chinchilla/bin/pip install chinchilla==0.2.0

`--draws FILE` only writes the constants of 400 bootstrap draws, which the planner's bands rest on:

    python benchmarks/fit_speed.py --draws compiler/data/epoch2024_draws.csv
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trainwright.compiler.fit.approach3 import DELTA, Floats, Problem, fit
from trainwright.compiler.fit.bootstrap import bootstrap

LEFT_OUT = 5  # of the highest losses, as Besiroglu et al. 2024 do
BOOTSTRAPS, DRAWS, SEED = 1000, 400, 0
# The global optimum of these runs, which a grid of 4,500 starts with tight tolerances reaches too, and what the fit may take.
PUBLISHED = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172}
CONSTANT_TOLERANCE, OBJECTIVE, FIT_S, BOOTSTRAP_S, TIMES_FASTER = 1e-4, 0.0010182741, 0.5, 30.0, 100.0
# 3^5 = 243 starts over the ranges of the package's README, one process. Its log-Huber loss has a threshold of 1 by default, at
# which it is least squares here; Hoffmann et al.'s threshold is given to it too.
PEER_DELTAS = (1.0, DELTA)
PEER = """
import functools, json, sys, tempfile, time
import numpy as np
from chinchilla import Chinchilla
from chinchilla._metrics import log_huber
params, tokens, loss = np.array(json.load(sys.stdin))
grid = dict(E=np.linspace(1, 2, 3), a=np.linspace(1, 10, 3), b=np.linspace(1, 10, 3),
            alpha=np.linspace(0.1, 0.7, 3), beta=np.linspace(0.1, 0.7, 3))
law = Chinchilla(tempfile.mkdtemp(), grid, loss_fn=functools.partial(log_huber, delta=DELTA), log_level=50)
for N, D, L in zip(params, tokens, loss):
    law.append(N=N, D=D, loss=L)
start = time.process_time()
law.fit(parallel=False)
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds} | {name: float(getattr(law, name)) for name in ("A", "B", "E", "alpha", "beta")}))
"""


def load_runs(reference: Path, left_out: int = LEFT_OUT) -> tuple[Floats, Floats, Floats]:
    """(parameters, tokens, loss) of the 240 runs, or of more."""
    with (reference / "scaling" / "svg_extracted_data.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    columns = [np.array([float(row[key]) for row in rows]) for key in ("Model Size", "Training FLOP", "loss")]
    # In the file's order, which the draws follow.
    kept = np.argsort(np.argsort(columns[2])) < len(rows) - left_out
    params, flops, loss = (column[kept] for column in columns)
    return params, flops / (6 * params), loss


def objective(runs: tuple[Floats, Floats, Floats], constants: dict[str, float]) -> float:
    """Hoffmann et al.'s, of any constants."""
    params, tokens, loss = runs
    value = (
        constants["E"] + constants["A"] / params ** constants["alpha"] + constants["B"] / tokens ** constants["beta"]
    )
    size = np.abs(np.log(value) - np.log(loss))
    return float(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum())


def fit_peer(python: Path, runs: tuple[Floats, Floats, Floats], delta: float) -> tuple[dict[str, float], float]:
    """(constants, CPU seconds) of the peer."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python.absolute(), "-W", "ignore", "-c", PEER.replace("DELTA", str(delta))],
            input=json.dumps([column.tolist() for column in runs]),
            cwd=folder,
            env={**os.environ, "MPLBACKEND": "agg"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"the peer failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found, found.pop("seconds")


def write_draws(path: Path, problem: Problem, theta: Floats) -> None:
    """The constants of DRAWS draws, a row each, 9 significant digits."""
    constants = problem.constants(bootstrap(problem, theta, DRAWS, SEED))
    lines = [
        ",".join(constants),
        *(",".join(f"{value:.9g}" for value in row) for row in zip(*constants.values(), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=Path("build/peers/chinchilla/bin/python"))
    parser.add_argument("--draws", type=Path)
    arguments = parser.parse_args()
    folder = os.environ.get("TRAINWRIGHT_REFERENCE")
    if not folder:
        print("fit_speed: skipped: TRAINWRIGHT_REFERENCE is not set, and the runs to fit are in the reference folder")
        return
    runs = load_runs(Path(folder))
    start = time.process_time()
    problem = Problem.of(*runs)
    theta, value = fit(problem)
    fit_s = time.process_time() - start
    if arguments.draws:
        write_draws(arguments.draws, problem, theta)
        return
    start = time.process_time()
    draws = problem.constants(bootstrap(problem, theta, BOOTSTRAPS, SEED))
    bootstrap_s = time.process_time() - start
    found = {name: float(number) for name, number in problem.constants(theta).items()}
    error = max(abs(found[name] / PUBLISHED[name] - 1) for name in PUBLISHED)
    print(f"{len(runs[0])} runs, one core, process time\n")
    print(f"{'':>28}{'A':>10}{'B':>11}{'E':>10}{'alpha':>10}{'beta':>10}{'objective':>15}{'CPU s':>9}")
    show("trainwright", found, value, fit_s)
    for name, percent in (("2.5 %", 2.5), ("97.5 %", 97.5)):
        bound = {key: float(np.percentile(values, percent)) for key, values in draws.items()}
        show(f"{name} of {BOOTSTRAPS:,} draws", bound, math.nan, bootstrap_s)
    verdicts = [
        ("constants, largest relative error", error, CONSTANT_TOLERANCE, error <= CONSTANT_TOLERANCE, "at most"),
        ("objective", value, OBJECTIVE, value <= OBJECTIVE, "at most"),
        ("fit, CPU s", fit_s, FIT_S, fit_s < FIT_S, "below"),
        (f"{BOOTSTRAPS:,} bootstraps, CPU s", bootstrap_s, BOOTSTRAP_S, bootstrap_s < BOOTSTRAP_S, "below"),
    ]
    if arguments.peer.exists():
        for delta in PEER_DELTAS:
            peer, seconds = fit_peer(arguments.peer, runs, delta)
            theirs = objective(runs, peer)
            show(f"chinchilla, threshold {delta:g}", peer, theirs, seconds)
            times, share = seconds / fit_s, value / theirs
            verdicts += [
                (f"times faster than that at {delta:g}", times, TIMES_FASTER, times >= TIMES_FASTER, "at least"),
                (f"objective, of that at {delta:g}", share, 1.0, value < theirs, "below"),
            ]
    else:
        print(f"{arguments.peer} is not there: the peer is left out; this file's first lines say how to install it")
    print()
    for name, number, limit, passed, side in verdicts:
        print(f"{'ok' if passed else 'MISSED':>8}  {name:36}{number:14.8g}   {side} {limit:g}")
    sys.exit(not all(verdict[3] for verdict in verdicts))


def show(name: str, constants: dict[str, float], value: float, seconds: float) -> None:
    """One line of the table."""
    numbers = "{A:10.3f}{B:11.3f}{E:10.6f}{alpha:10.6f}{beta:10.6f}".format(**constants)
    shown = "" if math.isnan(value) else f"{value:.11f}"
    print(f"{name:>28}{numbers}{shown:>15}{seconds:9.3f}", flush=True)


if __name__ == "__main__":
    main()
