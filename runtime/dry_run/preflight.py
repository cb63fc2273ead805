"""What can be looked at without running anything: files, inputs, corpus size, disk, port, versions.

Only what belongs to the bundle itself is an error everywhere. The rest is one on the machine that the plan is for; on another it
is a warning, unless `strict`. Configs are not built here: the shadow builds every one of a program, and says what is refused.
"""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from trainwright.runtime.disk import free_bytes
from trainwright.runtime.dry_run.planned import Planned
from trainwright.runtime.errors import RunError
from trainwright.runtime.launch.bundle import Bundle, edited_files
from trainwright.runtime.launch.identity import CONNECTOR, require_inputs
from trainwright.runtime.launch.local import check_port
from trainwright.runtime.launch.packages import require_packages
from trainwright.runtime.manifest import Stage
from trainwright.runtime.workspace import Workspace

ERROR, WARNING, NOTE = "error", "warning", "note"
RENDEZVOUS_PORT = 29500  # templates/launch.sh.j2 has every node meet there
BYTES_PER_TOKEN = 4.0  # of text: an assumption; English in the tokenizers of Llama 3 or Qwen3 has 4 to 5
COMPRESSION = 3.0  # of .jsonl.gz, an assumption
# What a checkpoint holds of a parameter: weight, fp32 copy of a bf16 one, moments in fp32.
CHECKPOINT_BYTES = {("bf16", "adam"): 14, ("bf16", "lion"): 10, ("fp32", "adam"): 12, ("fp32", "lion"): 8}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `stage` is "" where it concerns all."""

    check: str
    stage: str
    severity: str  # ERROR | WARNING | NOTE
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.check}: {self.message}"


def preflight(
    bundle: Bundle, workspace: Workspace, planned: Planned, *, strict: bool = False, only: Sequence[str] = ()
) -> tuple[Finding, ...]:
    """Findings about a bundle and about this machine, for the stages in `only` (none: for all)."""
    stages = [stage for stage in bundle.stages if not only or stage.name in only]
    here = is_planned_machine(planned)
    grave = ERROR if strict or here else WARNING
    found = [*_files(bundle)]
    if not here:
        found.append(Finding("machine", "", NOTE, _other_machine(planned)))
    for stage in stages:
        found += _inputs(stage, workspace.data_root, grave)
    found += _corpus(stages, workspace.data_root, planned, ERROR if strict else WARNING)
    found += _disk(stages, workspace, planned, grave)
    found += _port(planned, grave)
    found += _versions(stages, planned, grave)
    return tuple(found)


def is_planned_machine(planned: Planned) -> bool:
    """Whether this machine has the devices of one of the plan's nodes."""
    if planned.platform == "cpu":
        return (os.cpu_count() or 1) >= planned.cluster.devices_per_node
    return _cuda_devices() >= planned.cluster.devices_per_node


def _cuda_devices() -> int:
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _other_machine(planned: Planned) -> str:
    cluster = planned.cluster
    has = f"{os.cpu_count()} cores" if planned.platform == "cpu" else f"{_cuda_devices()} CUDA devices"
    return (
        f"the plan is for {cluster.nodes:,} x {cluster.devices_per_node} {cluster.device}, and this one has {has}: what it lacks "
        "is a warning (--strict: an error)"
    )


def _files(bundle: Bundle) -> Iterator[Finding]:
    for note in edited_files(bundle):
        missing = note.startswith("missing")
        yield Finding(
            "files", "", ERROR if missing else NOTE, note if missing else f"{note}: what runs is what is there"
        )


def _inputs(stage: Stage, data_root: Path, grave: str) -> Iterator[Finding]:
    yield from _as_finding("inputs", stage.name, grave, lambda: require_inputs(stage, data_root))


def _as_finding(check: str, stage: str, severity: str, look: Callable[[], None]) -> Iterator[Finding]:
    try:
        look()
    except RunError as error:
        yield Finding(check, stage, severity, str(error))


def _corpus(stages: Sequence[Stage], data_root: Path, planned: Planned, severity: str) -> Iterator[Finding]:
    """Whether the sources hold as many tokens as the plan trains on."""
    for stage in stages:
        if stage.kind != "ingest" or any(text.startswith(CONNECTOR) for text in stage.inputs):
            continue  # what a connector makes has no size yet
        text_bytes = _text_bytes(stage, data_root)
        if not text_bytes:
            continue  # said of the inputs
        share = 1 - planned.data.validation_fraction - planned.data.test_fraction
        tokens = text_bytes / BYTES_PER_TOKEN * share
        epochs = planned.data.budget_tokens / tokens
        about = (
            f"{text_bytes / GIB:.3g} GiB are about {tokens:.3g} training tokens ({BYTES_PER_TOKEN:g} bytes a token assumed, "
            f"{share:.0%} of them for training); the plan trains on {planned.data.budget_tokens:.4g}: {epochs:,.3g} epochs"
        )
        if epochs > 1:
            fix = "add text, lower data.tokens, or state data.unique_tokens so that the plan counts on repetition"
            yield Finding("corpus", stage.name, severity, f"the corpus is too small: {about}; {fix}")
        else:
            yield Finding("corpus", stage.name, NOTE, about)


def _text_bytes(stage: Stage, data_root: Path) -> float:
    total = 0.0
    for pattern in stage.inputs:
        for name in glob.glob(pattern, root_dir=data_root, recursive=True):
            path = data_root / name
            if path.is_file():
                total += path.stat().st_size * (COMPRESSION if name.endswith(".gz") else 1.0)
    return total


def _disk(stages: Sequence[Stage], workspace: Workspace, planned: Planned, grave: str) -> Iterator[Finding]:
    """Room for checkpoints (those kept, and one that is being written) and for prepared data."""
    trained = [stage for stage in stages if _is_trained(stage, planned)]
    a_parameter = CHECKPOINT_BYTES[planned.training.precision, planned.training.optimizer]
    a_checkpoint = a_parameter * planned.estimates.padded_parameters
    checkpoints = len(trained) * (planned.kernels.checkpoint_keep_last + 1) * a_checkpoint
    text = sum(_text_bytes(stage, workspace.data_root) for stage in stages if stage.kind == "ingest")
    width = 2 if planned.shape.vocab_size <= 1 << 16 else 4
    data = 2 * text + width * text / BYTES_PER_TOKEN  # ingested, curated; tokens
    needed, free = checkpoints + data, free_bytes(workspace.work)
    said = (
        f"{needed / GIB:,.1f} GiB below {workspace.work}: checkpoints {checkpoints / GIB:,.1f} ({len(trained)} stages x "
        f"{planned.kernels.checkpoint_keep_last + 1} x {a_checkpoint / GIB:,.2f}, {a_parameter} bytes a parameter), data "
        f"{data / GIB:,.1f}"
    )
    if free is not None and needed > free:
        lack = f"needs {said}; {free / GIB:,.1f} GiB are free: make room, or name a larger disk with --work"
        yield Finding("disk", "", grave, lack)
    else:
        yield Finding("disk", "", NOTE, f"needs up to {said}")


def _is_trained(stage: Stage, planned: Planned) -> bool:
    program = planned.program(stage.name)
    return program is not None and any(rank.gradient_bytes for rank in program.ranks)


def _port(planned: Planned, grave: str) -> Iterator[Finding]:
    if planned.cluster.nodes > 1:  # one node takes a free port
        yield from _as_finding("port", "", grave, lambda: check_port(RENDEZVOUS_PORT))


def _versions(stages: Sequence[Stage], planned: Planned, grave: str) -> Iterator[Finding]:
    yield from _as_finding("packages", "", grave, lambda: require_packages(stages))
    for name, wanted in sorted(_pinned().items()):
        installed = _version(name)
        if installed and not wanted.contains(installed, prereleases=True):
            fix = f"pip install '{name}{wanted}'"
            yield Finding(
                "versions", "", grave, f"{name} {installed} is installed, the programs are for {wanted}: {fix}"
            )
    if planned.platform != "cuda":
        return
    if planned.kernels.layer_spec == "transformer_engine" and not _version("transformer-engine"):
        text = "Transformer Engine is not installed: pip install 'transformer-engine[pytorch]', or layout.layer_spec: local"
        yield Finding("versions", "", grave, text)
    if not any(_version(f"nvidia-nccl-cu{number}") for number in (12, 13)):
        yield Finding("versions", "", grave, "no NCCL is installed: install torch's CUDA build, which brings it")


def _pinned() -> dict[str, Any]:
    """What this installation of trainwright asks of torch and megatron-core, as version specifiers."""
    from packaging.requirements import Requirement

    wanted = (Requirement(text) for text in metadata.requires("trainwright") or ())
    return {one.name: one.specifier for one in wanted if one.name in ("torch", "megatron-core")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
