"""The Layouts table: one array a degree, one row a candidate. Every estimate and every rule of legality reads it.

One set of formulas serves a search over a million rows and a plan of one; a test compares row i of a batch with row i alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from trainwright.compiler.facts import Device
from trainwright.compiler.plan import Layout, Shape

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DEGREES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")
# The code of a word is its place here.
RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_METHODS = ("none", "uniform", "block")
FSDP = ("none", "optim", "optim_grads", "optim_grads_params")
WORDS = {"recompute": RECOMPUTE, "recompute_method": RECOMPUTE_METHODS, "fsdp": FSDP}
# What selective recompute may name (Megatron-Core 0.16, TransformerConfig.recompute_modules); a set of them is coded in bits.
MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
NONE, SELECTIVE, FULL = range(3)
BYTES = {"bf16": 2, "fp32": 4}  # of a weight or an activation


@dataclass(frozen=True)
class Layouts:
    """Columns of equal length; fields as in `plan.Layout`, words as codes (their places in WORDS), modules as bits."""

    tensor: Ints
    pipeline: Ints
    virtual_pipeline: Ints
    context: Ints
    expert: Ints
    expert_tensor: Ints
    data: Ints
    micro_batch: Ints
    micro_batches: Ints
    first_stage_layers: Ints
    last_stage_layers: Ints
    embedding_as_layer: Bools
    loss_as_layer: Bools
    sequence_parallel: Bools
    distributed_optimizer: Bools
    fsdp: Ints
    recompute: Ints
    recompute_modules: Ints
    recompute_method: Ints
    recompute_layers: Ints
    padded_vocab_size: Ints

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: Bools | Ints | slice) -> "Layouts":
        """The rows of a mask, of indices or of a slice."""
        return Layouts(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def row(self, index: int) -> Layout:
        """One row as the plan writes it."""
        values = {field.name: getattr(self, field.name)[index].item() for field in fields(self)}
        words = {name: known[values[name]] for name, known in WORDS.items()}
        modules = tuple(name for bit, name in enumerate(MODULES) if values["recompute_modules"] >> bit & 1)
        return Layout(**(values | words | {"recompute_modules": modules}))


def modules_code(modules: Sequence[str]) -> int:
    """The bits of a set of modules. Raises ValueError for one that is not in MODULES."""
    return sum(1 << MODULES.index(name) for name in set(modules))


def recomputes(layouts: Layouts, module: str) -> Bools:
    """Which rows recompute a module by selective recompute."""
    named = (layouts.recompute_modules >> MODULES.index(module)) & 1
    return np.asarray((layouts.recompute == SELECTIVE) & (named == 1))


def one_layout(layout: Layout) -> Layouts:
    """The table of one row. Raises ValueError on a word that is not in WORDS, or a module that is not in MODULES."""
    values = {field.name: getattr(layout, field.name) for field in fields(layout)}
    values |= {name: known.index(values[name]) for name, known in WORDS.items()}
    values["recompute_modules"] = modules_code(layout.recompute_modules)
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
    optimizer: str = field(default="adam", kw_only=True)  # | "lion"
    gradient_bytes: int = field(default=4, kw_only=True)  # in which they are summed
    local_layers: bool = field(default=False, kw_only=True)  # Megatron-Core's own, not Transformer Engine's
    overlap: bool  # gradient reduction and parameter gathering run beside the backward and the forward pass

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node
