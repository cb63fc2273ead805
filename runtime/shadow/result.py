"""What a shadow run found, as plain data that crosses from the process that ran the program to the one that reports. No torch.

Bytes are those of allocated storages, on a CUDA device rounded up to 512 as its allocator does; FLOPs count 2 a multiply-add.
"""

from dataclasses import dataclass

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "temporaries")
# What a model is cut into when figures are compared with the plan's (compiler/estimate/programs.py).
MODULES = (
    *("embedding", "attention", "ffn", "experts", "shared_experts", "router", "norms", "mtp", "output"),
    "other",
)
MEASURED, STAND_IN = "measured", "stand-in"


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the layout: its number within each group, from 0."""

    rank: int
    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int
    expert_tensor: int

    def __str__(self) -> str:
        degrees = ("pipeline", "tensor", "context", "data", "expert", "expert_tensor")
        stated = ", ".join(f"{name} {getattr(self, name)}" for name in degrees)
        return f"rank {self.rank} of {self.world_size:,} ({stated})"


@dataclass(frozen=True)
class ModuleFigures:
    """Of one of MODULES on this rank."""

    module: str
    parameters: int
    flops: int  # in a step


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is alive at the peak."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    kind: str
    module: str  # the name of the module in which it was made, e.g. "decoder.layers.0.mlp"; "" outside of all
    made_by: str  # an operation


@dataclass(frozen=True)
class Peak:
    """The moment of the measured step at which most bytes are alive."""

    bytes: int
    by_kind: dict[str, int]
    moment: str  # in words: which pass of which micro-batch, in which module
    largest: tuple[HeldTensor, ...]


@dataclass(frozen=True)
class Collective:
    """Messages of one operation over one group, in a step."""

    operation: str  # torch's name of it: allreduce_, _reduce_scatter_base_, send, ...
    group: str  # Megatron-Core's name of the group
    size: int  # ranks in the group
    count: int
    bytes: int  # of what this rank gives to it, all together


@dataclass(frozen=True)
class RankResult:
    """One program on one rank."""

    stage: str
    kind: str
    place: Place
    micro_batches: int  # of a step
    ran: int  # how many of them were run; the others repeat what the steady state does
    parameters: int
    modules: tuple[ModuleFigures, ...]
    static_bytes: dict[str, int]  # by kind, alive between two steps; of tensors, not rounded up
    activation_bytes: int  # of one micro-batch: what its forward pass leaves for its backward pass
    peak: Peak
    reference_peak_bytes: int  # while a frozen model is asked (DPO's reference); 0: it is not
    flops: int
    collectives: tuple[Collective, ...]
    sources: dict[str, str]  # of each figure: MEASURED (the real operations ran) or STAND_IN
    stand_ins: tuple[str, ...]  # classes and functions that took part
    notes: tuple[str, ...]  # what was assumed
    seconds: float  # that this run took

    @property
    def peak_bytes(self) -> int:
        """The most bytes of tensors alive at once: in a step, or while a reference is asked before it."""
        return max(self.peak.bytes, self.reference_peak_bytes)
