"""FLOPs of training: what Megatron reports (`model_flops`), and what the devices execute (`executed_flops`).

Both count matrix products and attention (2 FLOPs a multiply-add, backward twice the forward), causal attention as half of the
score matrix, as Megatron-LM's `num_floating_point_operations` does; neither counts norms, softmax, the router or the embedding
look-up. float64 throughout: N x D passes the range of int64.
"""

import numpy as np

from trainwright.compiler.estimate.layouts import FULL, RECOMPUTE_METHODS, Floats, Layouts, Workload, recomputes
from trainwright.compiler.estimate.params import (
    count_body_parameters,
    ffn_parameters,
    query_size,
    used_matrices,
    value_size,
)
from trainwright.compiler.estimate.placement import num_mixtures
from trainwright.compiler.plan import Shape


def layers_forward_flops(shape: Shape, context_length: float | Floats) -> Floats:
    """Forward FLOPs of all layers a token, attention core included; multi-token prediction is apart."""
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
    """Training FLOPs a token that all devices together execute: with recompute and the padded vocabulary."""
    shape, length = workload.shape, workload.context_length
    padded = layouts.padded_vocab_size.astype(np.float64)
    heads = head_forward_flops(shape, padded) + mtp_forward_flops(shape, length, padded)
    return layers_executed_flops(shape, length, layouts) + 3.0 * heads


def layers_executed_flops(shape: Shape, context_length: int, layouts: Layouts) -> Floats:
    """Forward, backward and recompute of all layers a token: full repeats the forward pass of the layers that it names, selective
    that of the modules."""
    forward = layers_forward_flops(shape, context_length)
    block = layouts.recompute_method == RECOMPUTE_METHODS.index("block")
    named = layouts.recompute_layers * layouts.virtual_pipeline * layouts.pipeline / shape.num_layers
    share = np.where(block, np.minimum(named, 1.0), 1.0)
    again = np.where(layouts.recompute == FULL, share * forward, 0.0)
    mixtures = num_mixtures(shape)
    modules: dict[str, float | Floats] = {
        "core_attn": shape.num_layers * core_forward_flops(shape, context_length),
        "mlp": 2.0 * (shape.num_layers - mixtures) * ffn_parameters(shape, mixture=False),
        "moe": 2.0 * mixtures * ffn_parameters(shape, mixture=True),
    }
    for name, flops in modules.items():
        again = again + np.where(recomputes(layouts, name), flops, 0.0)
    return 3.0 * forward + again
