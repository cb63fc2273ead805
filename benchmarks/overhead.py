"""What the emitted program costs beside a bare loop on the same Megatron-Core, and beside nothing but PyTorch.

    python benchmarks/overhead.py [--pairs 10] [--steps 6] [--plain 3] [--processes 1 2]

Runs the emitted program (A) and `bare_loop.py` (B) in turn, A B A B ..., each started anew on the same plan, and after the
first pairs `plain_loop.py` (C) too; the first step of each is left out. Prints the tokens a second of A as a share of B's and
of C's, pair by pair: median, and the lowest and highest. The bar is 0.97 of B. About 12 minutes on two free cores.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from emitted import intervals, prepare, run_steps, spec_of, start_program

HERE = Path(__file__).resolve().parent


def run_loop(name: str, bundle: Path, *, processes: int, steps: int) -> list[float]:
    """Seconds of steps 2 to `steps` of one of the loops beside this file."""
    output = bundle.parent / f"{name}.json"
    process = start_program(HERE / f"{name}.py", processes, arguments=(str(bundle), str(steps), str(output)))
    if process.wait():
        raise SystemExit(f"{name}.py failed")
    return intervals(dict(enumerate(json.loads(output.read_text()), start=1)), steps)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--plain", type=int, default=3, help="pairs after which PyTorch alone runs too")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        first: Path | None = None
        for processes in given.processes:
            bundle = prepare(Path(scratch) / f"of-{processes}", spec_of(processes), like=first)
            first = first or bundle
            compare(bundle, processes, given.pairs, given.steps, given.plain)


def compare(bundle: Path, processes: int, pairs: int, steps: int, plain_runs: int) -> None:
    """Print the comparison at one number of processes."""
    plan = json.loads((bundle / "plan.json").read_text())
    tokens, of_bare, of_plain = plan["training"]["tokens_per_step"], [], []
    print(f"{processes} process(es), {tokens:,} tokens a step, {plan['estimates']['parameters']:,} parameters")
    for pair in range(pairs):
        emitted = statistics.median(run_steps(bundle, processes=processes, steps=steps))
        bare = statistics.median(run_loop("bare_loop", bundle, processes=processes, steps=steps))
        of_bare.append(bare / emitted)
        text = f"  {pair + 1:2d}: emitted {emitted:.3f} s, bare {bare:.3f} s"
        if pair < plain_runs:
            plain = statistics.median(run_loop("plain_loop", bundle, processes=processes, steps=steps))
            of_plain.append(plain / emitted)
            text += f", PyTorch alone {plain:.3f} s"
        print(f"{text} a step", flush=True)
    for name, ratios in (("the bare loop", of_bare), ("PyTorch alone", of_plain)):
        if not ratios:
            continue
        print(
            f"  tokens/s of the emitted program / {name}: median {statistics.median(ratios):.3f}"
            f" ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
