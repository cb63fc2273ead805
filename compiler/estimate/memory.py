"""Bytes on the fullest device: parameters, gradients, optimizer, activations in flight, logits, overhead.

Weights and optimizer: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3, with Megatron's fp32 gradient buffer.
Activations: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, operation by operation, with flash attention (no score
matrix) and no dropout. In flight: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2. The fullest pipeline rank is the
first (most micro-batches in flight), the second (no embedding, and perhaps a layer more) or the last (logits): all are computed.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import (
    BYTES,
    FULL,
    RECOMPUTE_METHODS,
    Floats,
    Ints,
    Layouts,
    Workload,
    recomputes,
)
from trainwright.compiler.estimate.params import (
    DeviceParameters,
    device_parameters,
    key_size,
    layer_parameters,
    query_size,
    value_size,
)
from trainwright.compiler.estimate.placement import kinds_of, layers_on, ranks_of
from trainwright.compiler.plan import MemoryEstimate, Shape

MASTER_BYTES = {"bf16": 4, "fp32": 0}  # fp32 copies of bf16 weights
MOMENT_BYTES = {"adam": 8, "lion": 4}  # two moments in fp32, or one
SOFTMAX_BYTES = 4  # a logit, in fp32: Megatron's cross entropy turns it into the gradient in place
# Two assumptions of this first form, not measurements: what a process holds before its first tensor (CUDA context, NCCL and
# cuBLAS buffers; on a CPU an interpreter with torch and Megatron-Core), and the share of activations and logits that the
# allocator holds in blocks it cannot use.
BASE_BYTES = {"cuda": 2 * 2**30, "cpu": 2**29}
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, one row a layout."""

    parameters: Floats
    gradients: Floats
    optimizer: Floats
    activations: Floats
    logits: Floats
    overhead: Floats

    @property
    def total(self) -> Floats:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.overhead

    def row(self, index: int, capacity: int) -> MemoryEstimate:
        """One row as the plan writes it, whole bytes."""
        names = ("parameters", "gradients", "optimizer", "activations", "logits", "overhead")
        values = {name: int(getattr(self, name)[index]) for name in names}
        return MemoryEstimate(**values, total=sum(values.values()), capacity=capacity)


def estimate_memory(workload: Workload, layouts: Layouts) -> Memory:
    """Bytes on the fullest device of each layout."""
    names = ("parameters", "gradients", "optimizer", "activations", "logits", "overhead")
    fullest, *others = (rank_memory(workload, layouts, rank) for rank in ranks_of(layouts))
    for other in others:
        fuller = other.total > fullest.total
        fullest = Memory(**{name: np.where(fuller, getattr(other, name), getattr(fullest, name)) for name in names})
    return fullest


def rank_memory(workload: Workload, layouts: Layouts, rank: Ints) -> Memory:
    """Bytes on a device of a pipeline rank (a column)."""
    shape, width = workload.shape, BYTES[workload.precision]
    held = device_parameters(shape, workload.context_length, layouts, rank, local_layers=workload.local_layers)
    activations = _activations(workload, layouts, rank)
    logits = _logits(workload, layouts) * (rank == layouts.pipeline - 1)
    return Memory(
        parameters=width * held.total,
        gradients=workload.gradient_bytes * held.total,
        optimizer=(MASTER_BYTES[workload.precision] + MOMENT_BYTES[workload.optimizer])
        * _optimizer_shard(held, layouts),
        activations=activations,
        logits=logits,
        overhead=BASE_BYTES[workload.device.kind]
        + passing_bytes(workload, layouts)
        + FRAGMENTATION * (activations + logits),
    )


def passing_bytes(workload: Workload, layouts: Layouts) -> Floats:
    """Weight gradients leave their products in the compute precision and are then added to the fp32 buffer: those of one layer or
    of the vocabulary's matrix are alive at a time."""
    shape = workload.shape
    layers = [
        (layer.sharded + layer.down) / layouts.tensor + layer.expert / (layouts.expert * layouts.expert_tensor)
        for layer in (layer_parameters(shape, mixture=mixture) for mixture in kinds_of(shape))
    ]
    vocabulary = layouts.padded_vocab_size * shape.hidden_size / layouts.tensor
    return np.asarray(BYTES[workload.precision] * np.maximum(np.max(layers, axis=0), vocabulary))


def _optimizer_shard(held: DeviceParameters, layouts: Layouts) -> Floats:
    """Parameters whose optimizer state a device holds: with the distributed optimizer, a share of its data-parallel group's."""
    replicas = layouts.data * layouts.context
    of_experts = layouts.tensor * replicas / (layouts.expert * layouts.expert_tensor)  # folded over the same devices
    sharded = held.dense / replicas + held.expert / np.maximum(of_experts, 1.0)
    return np.where(layouts.distributed_optimizer, sharded, held.total)


def _activations(workload: Workload, layouts: Layouts, rank: Ints) -> Floats:
    shape, width = workload.shape, BYTES[workload.precision]
    tokens = layouts.micro_batch * workload.context_length / layouts.context  # of one micro-batch on one device
    split = np.where(layouts.sequence_parallel, layouts.tensor, 1)
    dense, mixture = (
        layer_activation_bytes_per_token(shape, width, workload.fused_activation, layouts, mixture=mixture)
        for mixture in (False, True)
    )
    held = layers_on(shape, layouts, rank)
    layers = held.dense + held.mixtures + shape.mtp_layers * (rank == layouts.pipeline - 1)
    whole = held.dense * dense + (layers - held.dense) * mixture
    full, block = layouts.recompute == FULL, layouts.recompute_method == RECOMPUTE_METHODS.index("block")
    # Full recompute keeps the input of a unit of layers; the unit that is being recomputed is whole again.
    units = np.where(block, np.minimum(layouts.recompute_layers * layouts.virtual_pipeline, layers), layers)
    a_unit = np.where(block, 1, np.maximum(layouts.recompute_layers, 1))
    inputs = units / a_unit * width * shape.hidden_size / split
    kept = np.where(full, inputs + (1 - units / np.maximum(layers, 1e-9)) * whole, whole)
    working = np.where(full, a_unit * np.maximum(dense * (held.dense > 0), mixture * (layers > held.dense)), 0.0)
    embedding = np.where(rank == layouts.pipeline - 1, 0.0, width * shape.hidden_size / split)
    embedding = np.where(layouts.pipeline == 1, width * shape.hidden_size / split, embedding)
    in_flight = micro_batches_in_flight(layouts, rank)
    return np.asarray(tokens * (in_flight * (kept + embedding) + working))


def layer_activation_bytes_per_token(
    shape: Shape, width: int, fused_activation: bool, layouts: Layouts, *, mixture: bool
) -> Floats:
    """Bytes that one layer keeps for its backward pass, a token of one device; `width` bytes an element.

    What is not split by tensor parallelism alone (norms and their neighbours) is split by sequence parallelism.
    """
    hidden = shape.hidden_size
    split = np.where(layouts.sequence_parallel, layouts.tensor, 1)
    tensor = layouts.tensor
    norms = 2 * width * hidden / split  # input of each norm (the residual stream)
    inputs = 2 * width * hidden / split  # input of the QKV product and of the FFN
    attention = width * _attention_elements(shape) / tensor
    # The runtime's own attention gathers keys and values of whole sequences, and each context rank keeps them.
    attention = attention + width * (layouts.context - 1) * _gathered_elements(shape) / tensor
    # What comes down the projections of latent attention, before and after its norm, is on every tensor rank.
    latent = shape.q_lora_rank + shape.kv_lora_rank
    attention = attention + width * (2 * latent + shape.qk_rope_head_dim) / split
    # flash attention's row sums
    core = np.where(recomputes(layouts, "core_attn"), 0.0, 4.0 * shape.num_attention_heads / tensor)
    # The activation keeps its input and gives its output to the second product; unfused, silu(gate) is kept as well.
    wide = (3 if fused_activation else 4) if shape.gated else 2
    if mixture:
        # Each token is copied to every expert it goes to: input, hidden and output of that expert.
        per_expert = 2 * hidden / split + wide * shape.expert_ffn_hidden_size / tensor
        shared = wide * shape.shared_ffn_hidden_size / tensor
        ffn = width * np.where(recomputes(layouts, "moe"), 0.0, shape.experts_per_token * per_expert + shared)
    else:
        ffn = width * np.where(recomputes(layouts, "mlp"), 0.0, wide * shape.ffn_hidden_size / tensor)
    return np.asarray(norms + inputs + attention + core + ffn)


def _attention_elements(shape: Shape) -> int:
    """Elements that attention keeps a token: q, k, v, and the output, which the projection keeps too."""
    if shape.kv_lora_rank:  # every head has keys and values of its own
        return 2 * query_size(shape) + 2 * value_size(shape)
    return 2 * query_size(shape) + 2 * key_size(shape)


def _gathered_elements(shape: Shape) -> int:
    """Elements of keys and values a token."""
    return query_size(shape) + value_size(shape) if shape.kv_lora_rank else 2 * key_size(shape)


def micro_batches_in_flight(layouts: Layouts, rank: Ints) -> Floats:
    """Micro-batches whose activations a device of a pipeline rank (a column) holds at once (fractions: of its layers).

    1F1B: pipeline on the first rank, 1 on the last. Interleaved: 2 (p - r - 1) + (v - 1) p + 1 chunks, each 1/v of the layers.
    """
    pipeline, chunks = layouts.pipeline, layouts.virtual_pipeline
    behind = pipeline - 1 - rank
    plain = np.minimum(behind + 1, layouts.micro_batches)
    interleaved = np.minimum(2 * behind + (chunks - 1) * pipeline + 1, layouts.micro_batches * chunks) / chunks
    return np.asarray(np.where(chunks > 1, interleaved, plain))


def _logits(workload: Workload, layouts: Layouts) -> Floats:
    """Logits of one micro-batch in the compute precision, and their softmax in fp32."""
    tokens = layouts.micro_batch * workload.context_length / layouts.context
    bytes_per_logit = BYTES[workload.precision] + SOFTMAX_BYTES
    return np.asarray(tokens * layouts.padded_vocab_size / layouts.tensor * bytes_per_logit)
