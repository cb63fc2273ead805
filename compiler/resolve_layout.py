"""What a spec leaves open of the layout: candidates of each degree, and what is pinned."""

from dataclasses import dataclass
from typing import Any

from trainwright.compiler.facts import Device, Family
from trainwright.compiler.ranges import Choice, list_divisors, open_choice
from trainwright.compiler.spec import LayoutSpec, Spec

_RECOMPUTE = ("none", "selective", "full")
_MOST_PIPELINE_STAGES = 1024
_MOST_EXPERT_DEVICES = 256  # expert-parallel: the largest that DeepSeek, Kimi and Qwen report, with a margin
_LARGEST_MICRO_BATCH = 64  # sequences: beyond it a device is busy already, and activations only grow
ONE, GRADIENTS = Choice((1,)), Choice(("fp32", "bf16"))


@dataclass(frozen=True)
class StageSplit:
    """How many layers the first and last pipeline stage hold, as stated. 0: as the others."""

    first_stage_layers: int
    last_stage_layers: int
    embedding_as_layer: bool
    loss_as_layer: bool


@dataclass(frozen=True)
class ResolvedLayout:
    """Candidates of each degree by itself; which tuples are legal is for `check.py` to say."""

    tensor: Choice[int]
    pipeline: Choice[int]
    data: Choice[int]
    micro_batch: Choice[int]
    recompute: Choice[str]
    layer_spec: Choice[str]
    virtual_pipeline: Choice[int] = ONE
    context: Choice[int] = ONE
    expert: Choice[int] = ONE
    expert_tensor: Choice[int] = ONE
    split: tuple[StageSplit, ...] = ()  # one when stated, else empty: as even as the layers allow
    sequence_parallel: tuple[bool, ...] = ()  # likewise: where tensor > 1
    distributed_optimizer: bool = True
    recompute_modules: tuple[str, ...] = ("core_attn",)  # of selective recompute
    recompute_method: str = "uniform"  # of full recompute
    recompute_layers: int = 1
    gradient_dtype: Choice[str] = GRADIENTS
    fsdp: str = "none"
    fp8: str = "none"
    fp8_recipe: str = "delayed"  # where fp8 is on


def resolve_layout(spec: Spec, family: Family, device: Device) -> ResolvedLayout:
    """Degrees that divide the devices; what is not searched has one candidate."""
    devices = spec.compute.nodes * spec.compute.devices_per_node
    layer_spec = spec.layout.layer_spec or ("transformer_engine" if device.kind == "cuda" else "local")
    return ResolvedLayout(
        # Beyond a node's fast links tensor parallelism is slower than any other layout.
        tensor=open_choice(
            spec.layout.tensor, list_divisors(spec.compute.devices_per_node, spec.compute.devices_per_node)
        ),
        pipeline=open_choice(spec.layout.pipeline, list_divisors(devices, _MOST_PIPELINE_STAGES)),
        data=open_choice(spec.layout.data, list_divisors(devices, devices)),
        micro_batch=open_choice(spec.layout.micro_batch, _powers_of_two(_LARGEST_MICRO_BATCH)),
        recompute=open_choice(spec.layout.recompute, _RECOMPUTE),
        layer_spec=Choice((layer_spec,)),
        **_further_layout(spec.layout, family, devices),
    )


def _further_layout(given: LayoutSpec, family: Family, devices: int) -> dict[str, Any]:
    """What is searched of mixtures alone, or is what the user pinned."""
    split = StageSplit(
        given.first_stage_layers or 0,
        given.last_stage_layers or 0,
        given.embedding_as_layer or False,
        given.loss_as_layer or False,
    )
    names = ("first_stage_layers", "last_stage_layers", "embedding_as_layer", "loss_as_layer")
    free_experts = list_divisors(devices, _MOST_EXPERT_DEVICES) if family.rules.num_experts else (1,)
    return {
        "virtual_pipeline": open_choice(given.virtual_pipeline, (1,)),
        "context": open_choice(given.context, (1,)),
        "expert": open_choice(given.expert, free_experts),
        "expert_tensor": open_choice(given.expert_tensor, (1,)),
        "split": (split,) if any(getattr(given, name) is not None for name in names) else (),
        "sequence_parallel": () if given.sequence_parallel is None else (given.sequence_parallel,),
        "distributed_optimizer": given.distributed_optimizer is not False,
        "recompute_modules": given.recompute_modules or ("core_attn",),
        "recompute_method": given.recompute_method or "uniform",
        "recompute_layers": given.recompute_layers or 1,
        "fsdp": given.fsdp or "none",
        "fp8": given.fp8 or "none",
        "fp8_recipe": given.fp8_recipe or "delayed",
        "gradient_dtype": open_choice(given.gradient_dtype, ("fp32", "bf16")),
    }


def _powers_of_two(most: int) -> tuple[int, ...]:
    return tuple(2**power for power in range(most.bit_length()))
