"""Bytes on the fullest device: parameters, gradients, optimizer, activations in flight, logits, overhead.

Weights and optimizer: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054), section 3, with Megatron's fp32 gradient buffer.
Activations: Korthikanti et al. 2022 (arXiv 2205.05198), section 4, operation by operation, with flash attention (no score
matrix) and no dropout. In flight: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2. The fullest pipeline rank is the
first (most micro-batches in flight) or the last (logits): both are computed.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import BYTES, FULL, SELECTIVE, Floats, Layouts, Workload
from trainwright.compiler.estimate.params import (
    DeviceParameters,
    device_parameters,
    key_size,
    layer_parameters,
    query_size,
)
from trainwright.compiler.plan import MemoryEstimate, Shape

GRADIENT_BYTES = 4  # Megatron's gradient buffer with `grad_reduce_in_fp32`, and fp32 training
OPTIMIZER_BYTES = {"bf16": 12, "fp32": 8}  # Adam's two moments in fp32, and for bf16 the fp32 master weights
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
    first, last = (_rank_memory(workload, layouts, last) for last in (False, True))
    fuller = last.total > first.total
    names = ("parameters", "gradients", "optimizer", "activations", "logits", "overhead")
    return Memory(**{name: np.where(fuller, getattr(last, name), getattr(first, name)) for name in names})


def _rank_memory(workload: Workload, layouts: Layouts, last: bool) -> Memory:
    shape, width = workload.shape, BYTES[workload.precision]
    held = device_parameters(shape, workload.context_length, layouts, last)
    activations = _activations(workload, layouts, last)
    logits = _logits(workload, layouts) * (last | (layouts.pipeline == 1))
    # Weight gradients leave their products in the compute precision and are then added to the fp32 buffer: those of one layer
    # or of the vocabulary's matrix are alive at a time.
    layer = layer_parameters(shape)
    transient = width * np.maximum(
        (layer.sharded + layer.expert / layouts.expert) / layouts.tensor,
        layouts.padded_vocab_size * shape.hidden_size / layouts.tensor,
    )
    return Memory(
        parameters=width * held.total,
        gradients=GRADIENT_BYTES * held.total,
        optimizer=OPTIMIZER_BYTES[workload.precision] * _optimizer_shard(held, layouts),
        activations=activations,
        logits=logits,
        overhead=BASE_BYTES[workload.device.kind] + transient + FRAGMENTATION * (activations + logits),
    )


def _optimizer_shard(held: DeviceParameters, layouts: Layouts) -> Floats:
    """Parameters whose optimizer state a device holds: with the distributed optimizer, a share of its data-parallel group's."""
    replicas = layouts.data * layouts.context
    sharded = held.dense / replicas + held.expert / np.maximum(replicas / layouts.expert, 1.0)
    return np.where(layouts.distributed_optimizer, sharded, held.total)


def _activations(workload: Workload, layouts: Layouts, last: bool) -> Floats:
    shape, width = workload.shape, BYTES[workload.precision]
    tokens = layouts.micro_batch * workload.context_length / layouts.context  # of one micro-batch on one device
    split = np.where(layouts.sequence_parallel, layouts.tensor, 1)
    whole = layer_activation_bytes_per_token(shape, width, workload.fused_activation, layouts)
    full = layouts.recompute == FULL
    # Full recompute keeps a layer's input; the layer that is being recomputed is whole again.
    kept = np.where(full, width * shape.hidden_size / split, whole)
    working = np.where(full, whole, 0.0)
    layers = shape.num_layers / layouts.pipeline
    embedding = 0.0 if last else width * shape.hidden_size / split
    in_flight = micro_batches_in_flight(layouts, last)
    return tokens * (in_flight * (layers * kept + embedding) + working)


def layer_activation_bytes_per_token(shape: Shape, width: int, fused_activation: bool, layouts: Layouts) -> Floats:
    """Bytes that one layer keeps for its backward pass, a token of one device; `width` bytes an element.

    What is not split by tensor parallelism alone (norms and their neighbours) is split by sequence parallelism.
    """
    hidden, queries, keys = shape.hidden_size, query_size(shape), key_size(shape)
    split = np.where(layouts.sequence_parallel, layouts.tensor, 1)
    tensor = layouts.tensor
    norms = 2 * width * hidden / split  # input of each norm (the residual stream)
    inputs = 2 * width * hidden / split  # input of the QKV product and of the FFN
    attention = width * (2 * queries + 2 * keys) / tensor  # q, k, v, and the output, which the projection keeps too
    core = np.where(
        layouts.recompute == SELECTIVE, 0.0, 4.0 * shape.num_attention_heads / tensor
    )  # flash attention's row sums
    # The activation keeps its input and gives its output to the second product; unfused, silu(gate) is kept as well.
    wide = (3 if fused_activation else 4) if shape.gated else 2
    if shape.num_experts:
        # Each token is copied to every expert it goes to: input, hidden and output of that expert.
        per_expert = 2 * hidden / split + wide * shape.expert_ffn_hidden_size / tensor
        ffn = width * shape.experts_per_token * per_expert
    else:
        ffn = width * wide * shape.ffn_hidden_size / tensor
    return norms + inputs + attention + core + ffn


def micro_batches_in_flight(layouts: Layouts, last: bool) -> Floats:
    """Micro-batches whose activations a device of the first or last rank holds at once (fractions: of its layers).

    1F1B: pipeline on the first rank, 1 on the last. Interleaved: 2 (p - r - 1) + (v - 1) p + 1 chunks, each 1/v of the layers.
    """
    pipeline, chunks = layouts.pipeline, layouts.virtual_pipeline
    behind = np.zeros_like(pipeline) if last else pipeline - 1
    plain = np.minimum(behind + 1, layouts.micro_batches)
    interleaved = np.minimum(2 * behind + (chunks - 1) * pipeline + 1, layouts.micro_batches * chunks) / chunks
    return np.where(chunks > 1, interleaved, plain)


def _logits(workload: Workload, layouts: Layouts) -> Floats:
    """Logits of one micro-batch in the compute precision, and their softmax in fp32."""
    tokens = layouts.micro_batch * workload.context_length / layouts.context
    bytes_per_logit = BYTES[workload.precision] + SOFTMAX_BYTES
    return np.asarray(tokens * layouts.padded_vocab_size / layouts.tensor * bytes_per_logit)
