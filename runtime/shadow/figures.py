"""What a shadowed job took, as a result that can be shown: bytes by kind at the peak, FLOPs and parameters by module."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from trainwright.runtime.shadow.driver import BACKWARD, BUILD, FORWARD, Shadowed
from trainwright.runtime.shadow.recorder import Block
from trainwright.runtime.shadow.result import (
    KINDS,
    MEASURED,
    MODULES,
    STAND_IN,
    Collective,
    HeldTensor,
    ModuleFigures,
    Peak,
    Place,
    RankResult,
)
from trainwright.runtime.shadow.trace import make_trace

LARGEST = 10  # tensors that are shown of a peak
# Part of a module's name -> which of MODULES it belongs to; the first that is found. Norms that a product holds are the norms'.
_PARTS = (
    (r"(^|\.)mtp\.", "mtp"),
    (r"embedding\.", "embedding"),
    (r"output_layer", "output"),
    (r"layer_?norm|norm\b", "norms"),
    (r"\.router", "router"),
    (r"shared_experts", "shared_experts"),
    (r"\.experts", "experts"),
    (r"self_attention", "attention"),
    (r"\.mlp", "ffn"),
)
_OF_ATTENTION = re.compile(r"self_attention\.(q_layernorm|k_layernorm|kv_layernorm|linear_(q|kv)_up_proj\.layer_norm)")


def part_of(name: str) -> str:
    """Which of MODULES a parameter or module of this name belongs to. The norms of queries and keys are the attention's."""
    if _OF_ATTENTION.search(name) and not re.search(r"(^|\.)mtp\.", name):
        return "attention"
    return next((part for pattern, part in _PARTS if re.search(pattern, name)), MODULES[-1])


def make_result(shadowed: Shadowed, stage: str, kind: str) -> RankResult:
    """The result of the rank on which the job ran; call it while its groups are there."""
    recorder, counts, job = shadowed.recorder, shadowed.counts, shadowed.job
    moment, alive = _alive_at_peak(shadowed)
    by_kind: Counter[str] = Counter()
    for block in alive:
        by_kind[block.kind] += block.bytes
    by_kind["temporaries"] += recorder.beside_peak
    modules = _modules(shadowed)
    notes = [f"every row is full: {_rows(shadowed)}"]
    if job.literals.model.num_moe_experts:
        notes.append("balanced routing: every expert gets as many tokens")
    engine = recorder.modules.stand_in_classes()
    stand_ins = sorted(engine | recorder.stand_ins)
    sources = dict.fromkeys(("parameters", "gradients", "optimizer", "buffers"), MEASURED)
    sources["activations"] = sources["temporaries"] = sources["peak"] = STAND_IN if stand_ins else MEASURED
    sources["flops"] = STAND_IN if recorder.stand_in_flops or recorder.stand_ins else MEASURED
    sources["collectives"] = STAND_IN if recorder.stand_in_messages or recorder.stand_ins else MEASURED
    if engine:
        sources["parameters"] = sources["gradients"] = sources["optimizer"] = STAND_IN
    return RankResult(
        stage=stage,
        kind=kind,
        place=_place(),
        micro_batches=job.micro_batches,
        ran=shadowed.ran,
        parameters=sum(part.parameters for part in modules),
        modules=modules,
        static_bytes={name: shadowed.static.get(name, 0) for name in KINDS if name in shadowed.static},
        activation_bytes=shadowed.activation_bytes,
        peak=Peak(
            bytes=recorder.peak,
            by_kind={name: by_kind[name] for name in KINDS if by_kind[name]},
            moment=moment,
            largest=tuple(
                HeldTensor(block.bytes, block.shape, block.dtype, block.kind, block.module, block.operation)
                for block in sorted(alive, key=lambda block: -block.bytes)[:LARGEST]
            ),
        ),
        reference_peak_bytes=shadowed.reference_peak_bytes,
        flops=sum(part.flops for part in modules),
        collectives=tuple(
            Collective(operation, group, ranks, counts.messages[operation, group, ranks], size)
            for (operation, group, ranks), size in sorted(counts.message_bytes.items())
        ),
        sources=sources,
        stand_ins=tuple(stand_ins),
        notes=tuple(notes),
        seconds=shadowed.seconds,
    )


def _modules(shadowed: Shadowed) -> tuple[ModuleFigures, ...]:
    flops: Counter[str] = Counter()
    for name, amount in shadowed.counts.flops.items():
        flops[part_of(name)] += amount
    parameters: Counter[str] = Counter()
    for chunk in shadowed.model.chunks:
        for name, parameter in chunk.named_parameters():
            parameters[part_of(name)] += parameter.numel()
    return tuple(
        ModuleFigures(name, parameters[name], flops[name]) for name in MODULES if parameters[name] or flops[name]
    )


def trace_of(shadowed: Shadowed, title: str) -> dict[str, Any]:
    """The measured step for Perfetto. The job ran with a history."""
    recorder = shadowed.recorder
    ends = _ends_of_forward_passes(recorder.phases)
    for block in recorder.blocks:
        block.kind = block.kind or _kind(block, ends)
    return make_trace(title, recorder.history or [], recorder.blocks, recorder.log)


def _alive_at_peak(shadowed: Shadowed) -> tuple[str, list[Block]]:
    """(the moment in words, the blocks that are alive at it, of which each gets its kind)."""
    recorder = shadowed.recorder
    alive = [
        block for block in recorder.blocks if block.born < recorder.peak_at and not 0 <= block.died < recorder.peak_at
    ]
    ends = _ends_of_forward_passes(recorder.phases)
    for block in alive:
        block.kind = block.kind or _kind(block, ends)
    phase = next((name for place, name in reversed(recorder.phases) if place < recorder.peak_at), BUILD)
    newest = max(alive, key=lambda block: block.born, default=None)
    where = f", in {newest.module}" if newest and newest.module else ""
    by = f", as {newest.operation} allocates {newest.bytes / 2**20:,.1f} MiB" if newest else ""
    return f"{phase}{where}{by}", alive


def _kind(block: Block, ends: dict[str, int]) -> str:
    """Of a block that does not outlive the step: an activation if its forward pass ends before it dies, or if a backward pass
    that recomputes made it; else it is temporary."""
    if block.phase.startswith(FORWARD):
        lasts = block.died < 0 or block.died > ends.get(block.phase, block.born)
        return "activations" if lasts else "temporaries"
    recomputed = block.phase == BACKWARD and block.kept_for_backward
    return "activations" if recomputed else "temporaries"


def _ends_of_forward_passes(phases: Iterable[tuple[int, str]]) -> dict[str, int]:
    """Phase -> the place in the log at which it ended last."""
    ends: dict[str, int] = {}
    before = ""
    for place, name in phases:
        if before:
            ends[before] = place
        before = name
    return ends


def _place() -> Place:
    return Place(
        rank=int(dist.get_rank()),
        world_size=int(dist.get_world_size()),
        tensor=int(parallel_state.get_tensor_model_parallel_rank()),
        pipeline=int(parallel_state.get_pipeline_model_parallel_rank()),
        context=int(parallel_state.get_context_parallel_rank()),
        data=int(parallel_state.get_data_parallel_rank()),
        expert=int(parallel_state.get_expert_model_parallel_rank()),
        expert_tensor=int(parallel_state.get_expert_tensor_parallel_rank()),
    )


def _rows(shadowed: Shadowed) -> str:
    micro = shadowed.job.micro_batch
    if not micro.segments:
        return f"{micro.rows} x {micro.length:,} tokens a micro-batch"
    return f"{micro.segments} sequences of {micro.length // micro.segments:,} tokens a micro-batch"
