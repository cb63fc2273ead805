"""What a bundle's plan says of its programs: read from plan.json, since a runtime has no compiler."""

import json
from dataclasses import dataclass
from pathlib import Path

from trainwright.runtime.errors import BundleError
from trainwright.runtime.manifest import PLAN_FILE, ManifestError, read_record


@dataclass(frozen=True)
class PlannedModule:
    """Of one of runtime.shadow.result.MODULES; FLOPs of a step."""

    module: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class PlannedRank:
    """Of every device of the pipeline ranks `first` to `last`. FLOPs of a step (of an evaluation: of a row); bytes a device."""

    first: int
    last: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int  # tensors
    overhead_bytes: int  # what the process and its allocator hold beside them
    flops: int
    modules: tuple[PlannedModule, ...]


@dataclass(frozen=True)
class PlannedProgram:
    """One stage's program."""

    stage: str
    kind: str
    ranks: tuple[PlannedRank, ...]

    def rank(self, pipeline: int) -> PlannedRank | None:
        """What is planned for a pipeline rank."""
        return next((rank for rank in self.ranks if rank.first <= pipeline <= rank.last), None)


@dataclass(frozen=True)
class Remedy:
    """A change of the layout that needs less memory; bytes on the fullest device, seconds a step."""

    change: str
    memory_bytes: int
    step_s: float


@dataclass(frozen=True)
class _Memory:
    capacity: int


@dataclass(frozen=True)
class _Layout:
    pipeline: int


@dataclass(frozen=True)
class _Data:
    budget_tokens: int
    validation_fraction: float
    test_fraction: float


@dataclass(frozen=True)
class _Training:
    precision: str
    optimizer: str


@dataclass(frozen=True)
class _Kernels:
    layer_spec: str
    checkpoint_keep_last: int


@dataclass(frozen=True)
class _Shape:
    vocab_size: int


@dataclass(frozen=True)
class _Estimates:
    padded_parameters: int
    memory: _Memory
    programs: tuple[PlannedProgram, ...]
    remedies: tuple[Remedy, ...]


@dataclass(frozen=True)
class _Cluster:
    device: str
    nodes: int
    devices_per_node: int


@dataclass(frozen=True)
class Planned:
    """The parts of a plan that a dry run reads, by its own names (compiler/plan.py). `estimates.memory.capacity`: bytes of a
    device."""

    shape: _Shape
    data: _Data
    training: _Training
    cluster: _Cluster
    layout: _Layout
    kernels: _Kernels
    estimates: _Estimates

    @property
    def platform(self) -> str:
        """ "cuda" or "cpu": which the programs were planned for."""
        return "cpu" if self.cluster.device == "cpu" else "cuda"

    def program(self, stage: str) -> PlannedProgram | None:
        """What is planned for a stage's program; None for one that computes with no model."""
        return next((program for program in self.estimates.programs if program.stage == stage), None)


def read_planned(bundle: Path) -> Planned:
    """Raises BundleError where plan.json is missing, damaged or of another version."""
    file = bundle / PLAN_FILE
    again = "compile the spec again with this trainwright"
    try:
        return read_record(Planned, json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); {again}") from error
    except ManifestError as error:
        raise BundleError(f"{file}: {error}: it is damaged, or of another version; {again}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: it is no JSON ({error}); {again}") from error
