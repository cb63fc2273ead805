"""The Layouts table: one array a degree, one row a candidate. Every estimate and every rule of legality reads it.

One set of formulas serves a search over a million rows and a plan of one; a test compares row i of a batch with row i alone.
"""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from trainwright.compiler.facts import Device
from trainwright.compiler.plan import Layout, Shape

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

RECOMPUTE = ("none", "selective", "full")  # the code of a mode is its place here
NONE, SELECTIVE, FULL = range(3)
BYTES = {"bf16": 2, "fp32": 4}  # of a weight or an activation


@dataclass(frozen=True)
class Layouts:
    """Columns of equal length; fields as in `plan.Layout`, recompute as a code (its place in RECOMPUTE)."""

    tensor: Ints
    pipeline: Ints
    virtual_pipeline: Ints
    context: Ints
    expert: Ints
    data: Ints
    micro_batch: Ints
    micro_batches: Ints
    sequence_parallel: Bools
    distributed_optimizer: Bools
    recompute: Ints
    padded_vocab_size: Ints

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: Bools | Ints | slice) -> "Layouts":
        """The rows of a mask, of indices or of a slice."""
        return Layouts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def row(self, index: int) -> Layout:
        """One row as the plan writes it."""
        values = {field.name: getattr(self, field.name)[index].item() for field in fields(self)}
        return Layout(**(values | {"recompute": RECOMPUTE[values["recompute"]]}))


def one_layout(layout: Layout) -> Layouts:
    """The table of one row. Raises ValueError on a recompute mode that is not in RECOMPUTE."""
    values = {field.name: getattr(layout, field.name) for field in fields(layout)}
    values["recompute"] = RECOMPUTE.index(layout.recompute)
    return Layouts(**{name: np.array([value]) for name, value in values.items()})


@dataclass(frozen=True)
class Workload:
    """What every row of a table shares: the model, the machine, and the kernels that change memory or time."""

    shape: Shape
    context_length: int  # tokens a sequence
    precision: str  # "bf16" | "fp32"
    device: Device
    devices_per_node: int
    nodes: int
    fused_activation: (
        bool  # the gated activation keeps its input, not its factors (Transformer Engine, Megatron's fusion)
    )
    overlap: bool  # gradient reduction and parameter gathering run beside the backward and the forward pass

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node
