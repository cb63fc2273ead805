"""FLOPs of training: what Megatron reports (`model_flops`), and what the devices execute (`executed_flops`).

Both count matrix products and attention (2 FLOPs a multiply-add, backward twice the forward), causal attention as half of the
score matrix, as Megatron-LM's `num_floating_point_operations` does; neither counts norms, softmax or the embedding look-up, and
what is reported leaves out the router. float64 throughout: N x D passes the range of int64.
"""

import numpy as np

from trainwright.compiler.estimate.layouts import FULL, RECOMPUTE_METHODS, Floats, Layouts, Workload, recomputes
from trainwright.compiler.estimate.params import (
    count_body_parameters,
    matrices_by_module,
    query_size,
    used_matrices,
    value_size,
)
from trainwright.compiler.estimate.placement import num_mixtures
from trainwright.compiler.plan import Shape


def layers_forward_flops(shape: Shape, context_length: float | Floats) -> Floats:
    """Forward FLOPs of all layers a token, attention core included; multi-token prediction and routers are apart."""
    return 2.0 * count_body_parameters(shape) + shape.num_layers * core_forward_flops(shape, context_length)


def core_forward_flops(shape: Shape, context_length: float | Floats) -> Floats:
    """Forward FLOPs of the attention core of one layer a token: queries x keys and scores x values, causal: half of each.

    Grouped keys do not change it; a context split over devices does not either (each pair is met once).
    """
    return np.asarray(1.0 * (query_size(shape) + value_size(shape)) * context_length, dtype=np.float64)


def mtp_forward_flops(shape: Shape, context_length: float | Floats, vocab_size: int | Floats) -> Floats:
    """Forward FLOPs of multi-token prediction a token: for each of its layers the product of two hidden states, a transformer
    layer, and the output layer once more."""
    layer = 2.0 * used_matrices(shape, mixture=shape.num_experts > 0) + core_forward_flops(shape, context_length)
    product = 4.0 * shape.hidden_size**2
    return np.asarray(shape.mtp_layers * (layer + product + head_forward_flops(shape, vocab_size)))


def head_forward_flops(shape: Shape, vocab_size: int | Floats) -> Floats:
    """Forward FLOPs of the output layer a token."""
    return np.asarray(2.0 * shape.hidden_size * vocab_size, dtype=np.float64)


def forward_flops_per_token(shape: Shape, context_length: float | Floats, output_layer: bool = True) -> Floats:
    """FLOPs of a forward pass a token, vocabulary without padding; a scalar head in place of the output layer counts nothing."""
    layers = layers_forward_flops(shape, context_length)
    heads = head_forward_flops(shape, shape.vocab_size) + mtp_forward_flops(shape, context_length, shape.vocab_size)
    return np.asarray(layers + output_layer * heads, dtype=np.float64)


def model_flops_per_token(shape: Shape, context_length: float) -> float:
    """Training FLOPs a token in Megatron's convention: no recompute, vocabulary without padding."""
    return float(3.0 * forward_flops_per_token(shape, context_length))


def executed_flops_per_token(workload: Workload, layouts: Layouts) -> Floats:
    """Training FLOPs a token that all devices together execute: with recompute, routers and the padded vocabulary.

    `programs.estimate_program` counts the same device by device, exactly.
    """
    shape = workload.shape
    heads = (1 + shape.mtp_layers) * head_forward_flops(shape, layouts.padded_vocab_size.astype(np.float64))
    product = 4.0 * shape.mtp_layers * shape.hidden_size**2
    # Full recompute by blocks leaves multi-token prediction out (Megatron-Core 0.16).
    uniform = 1.0 * (layouts.recompute_method == RECOMPUTE_METHODS.index("uniform"))
    mtp = shape.mtp_layers * _executed_of_layer(workload, layouts, mixture=shape.num_experts > 0, full_share=uniform)
    return np.asarray(layers_executed_flops(workload, layouts) + mtp + 3.0 * (product + heads) + uniform * product)


def layers_executed_flops(workload: Workload, layouts: Layouts) -> Floats:
    """Forward, backward and recompute of all layers a token; multi-token prediction is apart."""
    shape = workload.shape
    block = layouts.recompute_method == RECOMPUTE_METHODS.index("block")
    named = layouts.recompute_layers * layouts.virtual_pipeline * layouts.pipeline / shape.num_layers
    share = np.where(block, np.minimum(named, 1.0), 1.0)
    mixtures = num_mixtures(shape)
    dense = (shape.num_layers - mixtures) * _executed_of_layer(workload, layouts, mixture=False, full_share=share)
    return dense + mixtures * _executed_of_layer(workload, layouts, mixture=True, full_share=share)


def _executed_of_layer(workload: Workload, layouts: Layouts, *, mixture: bool, full_share: float | Floats) -> Floats:
    """Of one layer a token: full recompute repeats the forward pass of a share of the layers, selective that of the modules."""
    shape = workload.shape
    used = matrices_by_module(shape, mixture=mixture)
    core = core_forward_flops(shape, workload.context_length)
    ffn = 2.0 * used.ffn
    moe = 2.0 * (used.experts + used.shared_experts + used.router)
    forward = 2.0 * (used.attention + used.down) + core + ffn + moe
    again = np.where(layouts.recompute == FULL, full_share * forward, 0.0)
    for name, flops in (
        ("core_attn", core),
        ("mlp", ffn),
        ("moe", moe),
        ("shared_experts", 2.0 * used.shared_experts),
        ("mla_up_proj", 2.0 * used.up * (workload.device.kind == "cuda")),  # a CPU's program leaves it out
    ):
        again = again + np.where(recomputes(layouts, name), flops, 0.0)
    return np.asarray(3.0 * forward + again)
