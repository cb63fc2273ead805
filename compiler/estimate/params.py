"""Parameter counts: exact for a model (weights, norms, biases, learned positions, routers), and by pipeline rank for a device.

Counts follow Megatron-Core's GPTModel; the published counts of Llama 2 and 3, Mixtral and Qwen3 are tests.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import Floats, Layouts
from trainwright.compiler.plan import Shape


@dataclass(frozen=True)
class LayerParameters:
    """One layer: `sharded` is split over tensor, `replicated` is on each of its ranks, `expert` split over tensor and expert."""

    sharded: int
    replicated: int
    expert: int

    @property
    def total(self) -> int:
        return self.sharded + self.replicated + self.expert


def layer_parameters(shape: Shape) -> LayerParameters:
    """Parameters of one layer: attention, FFN or experts, norms, biases."""
    hidden, queries, keys = shape.hidden_size, query_size(shape), key_size(shape)
    norm = norm_parameters(shape)
    sharded = hidden * (queries + 2 * keys) + queries * hidden
    replicated = 2 * norm
    expert = 0
    if shape.linear_bias or shape.qkv_bias:
        sharded += queries + 2 * keys
    if shape.linear_bias:
        replicated += hidden
    if shape.qk_norm:
        replicated += 2 * shape.head_dim * (2 if shape.normalization == "LayerNorm" else 1)
    if shape.num_experts:
        expert = shape.num_experts * _ffn(shape, shape.expert_ffn_hidden_size)
        replicated += hidden * shape.num_experts  # router
    else:
        sharded += _ffn(shape, shape.ffn_hidden_size)
        if shape.linear_bias:
            sharded += shape.ffn_hidden_size * (2 if shape.gated else 1)
            replicated += hidden
    return LayerParameters(sharded, replicated, expert)


def count_parameters(shape: Shape, context_length: int) -> int:
    """All trainable parameters, without padding of the vocabulary. `context_length` counts for learned positions alone."""
    matrices = 1 if shape.tied_embeddings else 2
    return (
        matrices * shape.vocab_size * shape.hidden_size
        + position_parameters(shape, context_length)
        + shape.num_layers * layer_parameters(shape).total
        + norm_parameters(shape)
    )


def count_active_parameters(shape: Shape, context_length: int) -> int:
    """Parameters that one token uses: all of a dense model, `experts_per_token` of the experts of a mixture."""
    if not shape.num_experts:
        return count_parameters(shape, context_length)
    idle = shape.num_experts - shape.experts_per_token
    return count_parameters(shape, context_length) - shape.num_layers * idle * _ffn(shape, shape.expert_ffn_hidden_size)


def expert_parameters(shape: Shape) -> int:
    """Parameters of one expert of one layer; 0 in a dense model."""
    return _ffn(shape, shape.expert_ffn_hidden_size)


def count_body_parameters(shape: Shape) -> int:
    """Parameters of the layers' matrices that one token uses: N without embedding and output layer, as Step Law counts."""
    ffn = shape.experts_per_token * _ffn(shape, shape.expert_ffn_hidden_size)
    if not shape.num_experts:
        ffn = _ffn(shape, shape.ffn_hidden_size)
    return shape.num_layers * (2 * shape.hidden_size * (query_size(shape) + key_size(shape)) + ffn)


def count_as(counts: str, shape: Shape, context_length: int) -> float:
    """A shape's size as a scaling law counts it: `counts` is one of `facts.COUNTS`, which says what each counts."""
    vocabulary = shape.vocab_size * shape.hidden_size
    match counts:
        case "total":
            return float(count_parameters(shape, context_length))
        case "embedding_once":
            copies = 0 if shape.tied_embeddings else 1
            return float(count_parameters(shape, context_length) - copies * vocabulary)
        case "without_embedding":
            return float(count_body_parameters(shape) + vocabulary)
        case "body":
            return float(count_body_parameters(shape))
        case "active":
            copies = 1 if shape.tied_embeddings else 0
            return float(count_active_parameters(shape, context_length) + copies * vocabulary)
        case "flops":
            # DeepSeek LLM (arXiv 2401.02954), equation 2: 72 L d^2 + 12 L d s of a model whose queries are d wide.
            return 6.0 * count_body_parameters(shape) + 12.0 * shape.num_layers * query_size(shape) * context_length
        case _:
            raise ValueError(f"{counts!r} is no way to count a model's size")


@dataclass(frozen=True)
class DeviceParameters:
    """Parameters on one device of a pipeline rank, one row a layout; experts apart, because data parallelism splits them less."""

    dense: Floats
    expert: Floats

    @property
    def total(self) -> Floats:
        return self.dense + self.expert


def device_parameters(shape: Shape, context_length: int, layouts: Layouts, last: bool) -> DeviceParameters:
    """Parameters on a device of the first (`last` False) or the last pipeline rank, vocabulary padded.

    The first holds the embedding and learned positions, the last the final norm and the output layer; a tied output layer is
    a second copy where the ranks differ (Megatron-Core, `share_embeddings_and_output_weights`).
    """
    layer = layer_parameters(shape)
    layers = shape.num_layers / layouts.pipeline
    vocabulary = layouts.padded_vocab_size * shape.hidden_size / layouts.tensor
    single = layouts.pipeline == 1
    has_embedding = single | (not last)
    has_output = single | last
    copies = has_embedding * 1.0 + np.where(single, not shape.tied_embeddings, has_output)
    dense = (
        layers * (layer.sharded / layouts.tensor + layer.replicated)
        + copies * vocabulary
        + has_embedding * position_parameters(shape, context_length)
        + has_output * norm_parameters(shape)
    )
    return DeviceParameters(dense, layers * layer.expert / (layouts.tensor * layouts.expert))


def query_size(shape: Shape) -> int:
    """Width of all queries together: heads x head_dim."""
    return shape.num_attention_heads * shape.head_dim


def key_size(shape: Shape) -> int:
    """Width of all keys (or values) together: query groups x head_dim."""
    return shape.num_query_groups * shape.head_dim


def norm_parameters(shape: Shape) -> int:
    """One norm over the hidden size: a weight, with LayerNorm a bias too."""
    return shape.hidden_size * (2 if shape.normalization == "LayerNorm" else 1)


def position_parameters(shape: Shape, context_length: int) -> int:
    """The table of learned positions; 0 with RoPE."""
    return context_length * shape.hidden_size if shape.positions == "learned" else 0


def ffn_matrices(shape: Shape) -> int:
    """Matrices of an FFN: gate, up and down, or up and down."""
    return 3 if shape.gated else 2


def _ffn(shape: Shape, width: int) -> int:
    return ffn_matrices(shape) * shape.hidden_size * width
