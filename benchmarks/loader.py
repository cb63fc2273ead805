"""How fast one process reads training sequences, beside how fast a step consumes them.

    python benchmarks/loader.py [--tokens 100_000_000] [--sequences 1_000_000] [--length 4096] [--micro-batch 1]

Writes six sources of random documents (lengths as of web text), builds the stream of so many sequences of a blend of them, and
reads micro-batches in the order of a run, as one data-parallel rank of eight does. Prints the seconds that the indices take
(built; found built), tokens/s, and what the process holds; and beside it what a step consumes: of an H100-class device at an MFU
of 0.45 of 989 TFLOP/s, with 6 x parameters + 6 x layers x hidden_size x length FLOPs a token. Where a model is cut over tensor
or pipeline ranks, each of them reads all that its replica trains on: multiply by their number. The corpus has just been written,
so it is read from memory, not from a disk: a sequence is one piece of 16 KiB or so.
"""

import argparse
import json
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainwright.runtime.megatron.batches import Batches
from trainwright.runtime.megatron.data import TokenFile, build_training_stream

SOURCES = {"web": 0.62, "code": 0.2, "papers": 0.1, "books": 0.05, "encyclopedia": 0.02, "questions": 0.01}
WEIGHTS = (0.5, 0.2, 0.12, 0.1, 0.05, 0.03)  # of the sequences: the small ones are read several times
VOCABULARY = 128_000
MFU, PEAK = 0.45, 989e12
MODELS = {"GPT-2 small": (124e6, 12, 768), "TinyLlama 1.1B": (1.1e9, 22, 2048), "Llama 2 7B": (6.74e9, 32, 4096)}
RANKS = 8
TINY = 7_654  # tokens/s of one process of specs/tiny.yaml on two CPU cores, by its plan


def write_corpus(folder: Path, num_tokens: int) -> int:
    """The output of a tokenize stage; the number of documents."""
    (folder / "train").mkdir(parents=True)
    generator, documents = np.random.default_rng(0), 0
    for source, share in SOURCES.items():
        file, left = TokenFile(folder / "train" / source, VOCABULARY), int(share * num_tokens)
        while left > 0:
            size = min(left, int(generator.lognormal(6.0, 1.1)) + 8)
            file.add_document(generator.integers(0, VOCABULARY, size))  # type: ignore[arg-type]
            left, documents = left - size, documents + 1
        file.finish()
    (folder / "summary.json").write_text(json.dumps({"vocab_size": VOCABULARY, "end_of_text": 0}))
    return documents


def consumption(parameters: float, layers: int, hidden_size: int, length: int) -> float:
    """Tokens/s of one device."""
    return MFU * PEAK / (6 * parameters + 6 * layers * hidden_size * length)


def resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
        folder = Path(scratch) / "tokenize" / "output"
        documents = write_corpus(folder, given.tokens)
        print(f"{given.tokens:,} tokens in {documents:,} documents of {len(SOURCES)} sources", flush=True)
        before = resident_gib()
        batches = Batches(RANKS * given.micro_batch * 16)
        steps = given.sequences // batches.size(0)
        for what in ("built", "found built"):
            started = time.monotonic()
            stream = build_training_stream(
                folder, tuple(SOURCES), WEIGHTS, steps=steps, sequence_length=given.length, batches=batches, seed=1
            )
            print(
                f"indices of {steps * batches.size(0):,} sequences {what} in {time.monotonic() - started:.1f} s",
                flush=True,
            )
        read = measure(stream, steps, given.micro_batch, given.length, given.seconds)
        print(
            f"read by one rank of {RANKS}: {read:,.0f} tokens/s; the process grew by {resident_gib() - before:.2f} GiB"
        )
        for name, shape in MODELS.items():
            needed = consumption(*shape, given.length)
            print(f"  {name} on an H100: {needed:,.0f} tokens/s, {needed / read:.2%} of one core's time")
        print(f"  specs/tiny.yaml on a CPU core: {TINY:,} tokens/s, {TINY / read:.2%} of one core's time")
        dist.destroy_process_group()


def measure(stream: Any, steps: int, micro_batch: int, length: int, seconds: float) -> float:
    """Tokens/s, over steps at random places of the run."""
    order = np.random.default_rng(2).permutation(steps)
    stream.batch(int(order[0]), micro_batch, 0, RANKS)
    tokens, started = 0, time.monotonic()
    for step in order[1:]:
        tokens += sum(batch["tokens"].numel() for batch in stream.batch(int(step), micro_batch, 0, RANKS))
        if time.monotonic() - started > seconds:
            break
    return tokens / (time.monotonic() - started)


if __name__ == "__main__":
    main()
