"""An emitted pretraining program, run as it is for some steps: what benchmarks of the runtime measure.

`prepare` compiles a spec and executes the stages before pretraining once; `run_steps` starts the program and stops it after so
many steps. The time of a step is taken from the clock in its TensorBoard events: from the end of a step to the end of the next,
so that everything the program does between them counts.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

PATIENCE_S = 600.0
COMMAND = Path(sys.executable).with_name("trainwright")

# A Llama of 4M parameters, at 8 sequences a process and step: more than 1 s on a CPU core.
SPEC = """\
name: overhead
model:
  family: llama
  shape: {{num_layers: 4, hidden_size: 256, ffn_hidden_size: 768, num_attention_heads: 4}}
  context_length: 512
  vocab_size: 2048
  precision: fp32
data:
  sources:
    - {{name: prose, connector: python-stdlib:prose}}
  tokens: 40M   # more than is run: neither validation nor a checkpoint falls into the steps that are timed
training: {{global_batch: {batch} sequences, learning_rate: 1e-3}}
compute: {{device: cpu, nodes: 1, devices_per_node: {processes}}}
layout: {{micro_batch: 4}}
stages: {{pretrain: {{}}}}
"""


def spec_of(processes: int) -> str:
    """The spec for so many processes."""
    return SPEC.format(processes=processes, batch=8 * processes)


def prepare(folder: Path, spec: str, *, like: Path | None = None) -> Path:
    """Compile `spec` into `folder`/bundle and execute what comes before pretraining, or take that over from the bundle `like`;
    the bundle. Raises SystemExit with the compiler's message where it refuses."""
    bundle = folder / "bundle"
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(spec, encoding="utf-8")
    command = (str(COMMAND), "compile", str(folder / "spec.yaml"), "-o", str(bundle))
    compiled = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if compiled.returncode:
        raise SystemExit(compiled.stderr.strip())
    if like:
        shutil.copytree(like / "work", bundle / "work", ignore=shutil.ignore_patterns("pretrain"))
        return bundle
    stages = [stage["name"] for stage in json.loads((bundle / "manifest.json").read_text())["stages"]]
    for name in stages[: stages.index("pretrain")]:
        command = (str(COMMAND), "run", str(bundle), "--only", name)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bundle


def run_steps(bundle: Path, *, processes: int, steps: int) -> list[float]:
    """Seconds of steps 2 to `steps` of the bundle's pretraining, started anew."""
    folder = bundle / "work" / "pretrain"
    shutil.rmtree(folder, ignore_errors=True)
    (program,) = bundle.glob("*_pretrain.py")
    process = start_program(program, processes)
    try:
        started = time.monotonic()
        # Two steps more: TensorBoard writes its events by tens, and a step has fewer.
        while count_lines(folder / "metrics.jsonl") < steps + 2:
            if process.poll() is not None or time.monotonic() - started > PATIENCE_S:
                raise SystemExit(f"{program} ended, or hangs, before step {steps}")
            time.sleep(0.1)
    finally:
        stop(process)
    return intervals(step_ends(folder / "tensorboard"), steps)


def start_program(
    program: Path, processes: int, arguments: tuple[str, ...] = (), output: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """torchrun of a program, one thread a process; what it prints goes to `output`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return subprocess.Popen(
        (*launcher, str(program), *arguments),
        env=environment,
        stdout=output,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and its ranks, which torchrun starts in sessions of their own and ends when it is told to end."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise SystemExit("torchrun does not end its ranks") from None


def count_lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def step_ends(events: Path) -> Mapping[int, float]:
    """{step: when it was recorded, in s} of a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return {event.step: event.wall_time for event in accumulator.Scalars("loss")}


def intervals(ends: Mapping[int, float], steps: int) -> list[float]:
    """Seconds between the ends of steps 1 to `steps`."""
    return [later - earlier for earlier, later in itertools.pairwise(ends[step] for step in range(1, steps + 1))]
