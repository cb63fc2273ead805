"""How many layouts a second one core judges: legality, memory and step time.

    OMP_NUM_THREADS=1 python benchmarks/search_speed.py

Random layouts of Llama 3 8B on 32 nodes of H100, in tables of several lengths (short ones stay in the cache), timed by process
time. The figure beside it is a throw-away numpy prototype of estimators with more terms, on the same kind of core: 1.09 million
rows a second for memory and time together.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable

import numpy as np

from trainwright.compiler.estimate.layouts import Layouts, Workload
from trainwright.compiler.estimate.memory import estimate_memory
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.facts import find_device, find_family
from trainwright.compiler.layout_rules import Terms, legal_rows

ROWS = 1_000_000
TABLES = (100, 1_000, 10_000, 100_000)
PROTOTYPE_ROWS_PER_S = 1.09e6


def random_layouts(rows: int, seed: int) -> Layouts:
    """Rows with every degree drawn from powers of two, most of them illegal."""
    generator = np.random.default_rng(seed)

    def draw(most: int) -> np.ndarray:
        return np.left_shift(1, generator.integers(0, most.bit_length(), rows))

    tensor = draw(8)
    nothing, off = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.bool_)
    return Layouts(
        tensor=tensor,
        pipeline=draw(32),
        virtual_pipeline=draw(4),
        context=draw(4),
        expert=np.ones(rows, dtype=np.int64),
        data=draw(256),
        micro_batch=draw(8),
        micro_batches=draw(64),
        sequence_parallel=tensor > 1,
        distributed_optimizer=np.ones(rows, dtype=np.bool_),
        recompute=generator.integers(0, 3, rows),
        padded_vocab_size=np.full(rows, 128256),
        expert_tensor=nothing + 1,
        first_stage_layers=nothing,
        last_stage_layers=nothing,
        embedding_as_layer=off,
        loss_as_layer=off,
        fsdp=nothing,
        recompute_modules=nothing,
        recompute_method=nothing,
        recompute_layers=nothing,
    )


def rows_per_s(judge: Callable[[Layouts], object], table: Layouts, length: int) -> float:
    """Rows a second of `judge` over the table in pieces of `length`."""
    pieces = [table.take(slice(start, start + length)) for start in range(0, len(table), length)]
    judge(pieces[0])
    start = time.process_time()
    for piece in pieces:
        judge(piece)
    return len(table) / (time.process_time() - start)


def main() -> None:
    shape = find_family("llama").published["8B"]
    terms = Terms(shape=shape, context_length=8192, global_batch=512, nodes=32, devices_per_node=8)
    workload = Workload(
        shape=shape,
        context_length=8192,
        precision="bf16",
        device=find_device("h100"),
        devices_per_node=8,
        nodes=32,
        fused_activation=True,
        overlap=True,
    )
    judges: dict[str, Callable[[Layouts], object]] = {
        "legality": lambda table: legal_rows(terms, table),
        "memory": lambda table: estimate_memory(workload, table).total,
        "time": lambda table: estimate_step_time(workload, table).total,
    }

    def both(table: Layouts) -> None:
        judges["memory"](table)
        judges["time"](table)

    def every(table: Layouts) -> None:
        judges["legality"](table)
        both(table)

    judges |= {"memory and time": both, "all three": every}
    table = random_layouts(ROWS, seed=1234)
    print(
        f"{'rows a table':>15}" + "".join(f"{length:>12,}" for length in TABLES) + "   million rows a second, one core"
    )
    for name, judge in judges.items():
        sample = {length: table.take(slice(0, min(ROWS, 500 * length))) for length in TABLES}
        rates = [rows_per_s(judge, sample[length], length) / 1e6 for length in TABLES]
        print(f"{name:>15}" + "".join(f"{rate:12.2f}" for rate in rates))
    print(f"{'prototype':>15}" + f"{PROTOTYPE_ROWS_PER_S / 1e6:36.2f}" + f"{'':12}   memory and time")


if __name__ == "__main__":
    main()
