"""Emitted programs on one CUDA device: MFU and peak memory beside what the plan says. Does nothing where there is none.

    python benchmarks/cuda.py [--device h100-sxm-80gb] [--steps 20]

Llama shapes of 1.1B (TinyLlama's) and 7B (Llama 2's) parameters, bf16, sequences of 4,096, Megatron-Core's local layers without
Transformer Engine. The aim is an MFU of 0.45 on an H100-class device. A 7B model takes 18 bytes a parameter for weights,
gradients and Adam: 121 GB, so `compile` refuses it on a device of 80 GB, and that is what is printed there.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from emitted import prepare, run_steps

SHAPES = {
    "1.1B": "{num_layers: 22, hidden_size: 2048, ffn_hidden_size: 5632, num_attention_heads: 32, num_query_groups: 4}",
    "7B": "{num_layers: 32, hidden_size: 4096, ffn_hidden_size: 11008, num_attention_heads: 32}",
}
SPEC = """\
name: cuda
model: {{family: llama2, shape: {shape}, context_length: 4096}}
data:
  sources:
    - {{name: prose, connector: python-stdlib:prose}}
  tokens: 1B   # more than is run
training: {{global_batch: 32 sequences}}
compute: {{device: {device}, nodes: 1, devices_per_node: 1}}
layout: {{layer_spec: local}}
stages: {{pretrain: {{}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="h100-sxm-80gb")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; the plan is for {given.device}")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                bundle = prepare(Path(scratch) / name, SPEC.format(shape=shape, device=given.device))
            except SystemExit as error:
                print(f"{name}: {error}")
                continue
            measure(name, bundle, given.steps)


def measure(name: str, bundle: Path, steps: int) -> None:
    """Print what a program reached, and what its plan says."""
    plan = json.loads((bundle / "plan.json").read_text())
    estimates = plan["estimates"]
    step_s = statistics.median(run_steps(bundle, processes=1, steps=steps)[3:])  # the first ones warm up
    rows = [json.loads(line) for line in (bundle / "work" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    memory = max(row["memory_bytes"] for row in rows) / 2**30
    mfu = estimates["mfu"] * estimates["step_s"] / step_s  # the plan's FLOPs and peak
    print(
        f"{name}: {step_s:.3f} s a step (plan {estimates['step_s']:.3f}), MFU {mfu:.3f} (plan {estimates['mfu']:.3f}), "
        f"peak allocated {memory:.1f} GiB (plan {estimates['memory']['total'] / 2**30:.1f})"
    )


if __name__ == "__main__":
    main()
