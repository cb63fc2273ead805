"""FLOPs of training: what Megatron reports (`model_flops`), and what the devices execute (`executed_flops`).

Both count matrix products and attention (2 FLOPs a multiply-add, backward twice the forward), causal attention as half of the
score matrix, as Megatron-LM's `num_floating_point_operations` does; neither counts norms, softmax, the router or the embedding
look-up. float64 throughout: N x D passes the range of int64.
"""

import numpy as np

from trainwright.compiler.estimate.layouts import FULL, SELECTIVE, Floats, Layouts, Workload
from trainwright.compiler.estimate.params import count_body_parameters, query_size
from trainwright.compiler.plan import Shape


def layer_forward_flops(shape: Shape, context_length: float | Floats) -> Floats:
    """Forward FLOPs of one layer a token, attention core included."""
    return 2.0 * count_body_parameters(shape) / shape.num_layers + core_forward_flops(shape, context_length)


def core_forward_flops(shape: Shape, context_length: float | Floats) -> Floats:
    """Forward FLOPs of the attention core of one layer a token: two products of q x context, causal: half of each.

    Grouped keys do not change it; a context split over devices does not either (each pair is met once).
    """
    return np.asarray(2.0 * query_size(shape) * context_length, dtype=np.float64)


def head_forward_flops(shape: Shape, vocab_size: int | Floats) -> Floats:
    """Forward FLOPs of the output layer a token."""
    return np.asarray(2.0 * shape.hidden_size * vocab_size, dtype=np.float64)


def forward_flops_per_token(shape: Shape, context_length: float | Floats, output_layer: bool = True) -> Floats:
    """FLOPs of a forward pass a token, vocabulary without padding; a scalar head in place of the output layer counts nothing."""
    layers = shape.num_layers * layer_forward_flops(shape, context_length)
    return np.asarray(layers + output_layer * head_forward_flops(shape, shape.vocab_size), dtype=np.float64)


def model_flops_per_token(shape: Shape, context_length: float) -> float:
    """Training FLOPs a token in Megatron's convention: no recompute, vocabulary without padding."""
    return float(3.0 * forward_flops_per_token(shape, context_length))


def executed_flops_per_token(workload: Workload, layouts: Layouts) -> Floats:
    """Training FLOPs a token that all devices together execute: with recompute and the padded vocabulary."""
    shape, length = workload.shape, workload.context_length
    head = head_forward_flops(shape, layouts.padded_vocab_size.astype(np.float64))
    return shape.num_layers * layer_executed_flops(shape, length, layouts) + 3.0 * head


def layer_executed_flops(shape: Shape, context_length: int, layouts: Layouts) -> Floats:
    """Forward, backward and recompute of one layer a token: full repeats the forward pass, selective the attention core's."""
    forward, core = layer_forward_flops(shape, context_length), core_forward_flops(shape, context_length)
    again = np.where(layouts.recompute == FULL, forward, np.where(layouts.recompute == SELECTIVE, core, 0.0))
    return 3.0 * forward + again
