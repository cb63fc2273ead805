"""How long a shadow takes, imports included, and how much memory: `python benchmarks/shadow.py`.

Limits: 20 s for a rank of Llama 3 70B on 1,024 devices and of 405B on 16,384, 100 s for all 16 pipeline ranks of the 70B plan in
one process, 2 GB. Ends with 1 where one is missed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.resolve import resolve_spec

SPEC = """\
name: llama-{size}
model: {{family: llama, size: {size}, context_length: 8192, precision: bf16}}
data: {{sources: [{{name: web, path: 'corpus/*.jsonl'}}], tokens: 15T}}
training: {{global_batch: 16M tokens, learning_rate: 1e-4}}
compute: {{device: h100, nodes: {nodes}, devices_per_node: 8}}
layout: {{tensor: 8, pipeline: 16, micro_batch: 1}}
stages: {{pretrain: {{}}}}
"""
MEMORY_LIMIT = 2.0  # GB


def shadow(bundle: Path, devices: int, ranks: list[int]) -> tuple[float, float]:
    """(seconds, GB at most) of a process that shadows these ranks."""
    request = {"program": str(bundle / "05_pretrain.py"), "stage": "pretrain", "kind": "pretrain", "platform": "cuda"}
    request |= {"world_size": devices, "ranks": ranks}
    started = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "trainwright.runtime.shadow.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    answers = [json.loads(line) for line in child.stdout]
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - started
    assert status == 0
    assert len(answers) == len(ranks)
    assert all("result" in answer for answer in answers), answers
    return seconds, usage.ru_maxrss / 1e6


def main() -> None:
    missed = False
    print(f"{'':64} {'seconds':>8} {'limit':>6} {'GB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for size, nodes, ranks, limit in (
            ("70B", 128, [0], 20.0),
            ("405B", 2048, [0], 20.0),
            ("70B", 128, [64 * stage for stage in range(16)], 100.0),
        ):
            spec = Path(folder) / "spec.yaml"
            spec.write_text(SPEC.format(size=size, nodes=nodes))
            bundle = Path(folder) / "bundle"
            bundle.mkdir(exist_ok=True)
            for name, content in emit_bundle(choose_plan(resolve_spec(load_spec(spec, ())))).files.items():
                (bundle / name).write_bytes(content)
            seconds, memory = shadow(bundle, 8 * nodes, ranks)
            what = f"{len(ranks)} rank{'s' if len(ranks) > 1 else ''} of Llama 3 {size} on {8 * nodes:,} devices"
            print(f"{what:64} {seconds:8.1f} {limit:6.0f} {memory:6.2f}", flush=True)
            missed |= seconds > limit or memory > MEMORY_LIMIT
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
