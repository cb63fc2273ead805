"""Parameter counts: exact for a model (weights, norms, biases, learned positions, routers), and by pipeline rank for a device.

Counts follow Megatron-Core's GPTModel; the published counts of Llama 2 and 3, Mixtral and Qwen3 are tests.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import Floats, Ints, Layouts
from trainwright.compiler.estimate.placement import layers_on, num_mixtures
from trainwright.compiler.plan import Shape


@dataclass(frozen=True)
class LayerParameters:
    """One layer: `sharded` is split over tensor, `replicated` is on each of its ranks, `expert` split over expert and
    expert_tensor. `down`: latent attention's projections down, which Transformer Engine's layers keep whole on every tensor rank
    and Megatron-Core's own (the local layer spec) split."""

    sharded: int
    replicated: int
    expert: int
    down: int = 0

    @property
    def total(self) -> int:
        return self.sharded + self.replicated + self.expert + self.down

    def dense_on(self, tensor: Ints, *, local_layers: bool) -> Floats:
        """What a device holds of it beside experts, where that many tensor ranks split it."""
        down = self.down / tensor if local_layers else float(self.down)
        return np.asarray(self.sharded / tensor + self.replicated + down)


def layer_parameters(shape: Shape, *, mixture: bool) -> LayerParameters:
    """Parameters of one layer: attention, FFN or experts, norms, biases. A router's bias is no parameter: nothing learns it."""
    attention, used = attention_parameters(shape), matrices_by_module(shape, mixture=mixture)
    biases = ffn_bias_parameters(shape, mixture=mixture)
    return LayerParameters(
        sharded=attention.sharded + used.ffn + used.shared_experts + biases.sharded,
        replicated=attention.replicated + 2 * norm_parameters(shape) + used.router + biases.replicated,
        expert=shape.num_experts * expert_parameters(shape) if mixture else 0,
        down=attention.down,
    )


def ffn_bias_parameters(shape: Shape, *, mixture: bool) -> LayerParameters:
    """Biases of one layer's FFN; a mixture has none."""
    if mixture or not shape.linear_bias:
        return LayerParameters(0, 0, 0)
    return LayerParameters(shape.ffn_hidden_size * (2 if shape.gated else 1), shape.hidden_size, 0)


def attention_parameters(shape: Shape) -> LayerParameters:
    """Of one layer: projections, their biases, and the norms of queries, keys or latents."""
    return _latent_attention(shape) if shape.kv_lora_rank else _attention(shape)


def _attention(shape: Shape) -> LayerParameters:
    queries, keys = query_size(shape), key_size(shape)
    sharded = shape.hidden_size * (queries + 2 * keys) + queries * shape.hidden_size
    replicated = 0
    if shape.linear_bias or shape.qkv_bias:
        sharded += queries + 2 * keys
    if shape.linear_bias:
        replicated += shape.hidden_size
    if shape.qk_norm:
        replicated += 2 * shape.head_dim * (2 if shape.normalization == "LayerNorm" else 1)
    return LayerParameters(sharded, replicated, 0)


def _latent_attention(shape: Shape) -> LayerParameters:
    """DeepSeek-V2 (arXiv 2405.04434), equations 9 to 19: the projections down, their norms, the projections up, and the
    output's."""
    used = matrices_by_module(shape, mixture=False)
    norms = shape.kv_lora_rank + shape.q_lora_rank
    return LayerParameters(used.attention, norms * shape.qk_norm, 0, used.down)


def mtp_parameters(shape: Shape) -> LayerParameters:
    """One layer of multi-token prediction: three norms, the product of two hidden states (DeepSeek-V3, arXiv 2412.19437, equation
    21), and a transformer layer like the last; embedding and output layer are the model's own."""
    layer = layer_parameters(shape, mixture=shape.num_experts > 0)
    product = 2 * shape.hidden_size**2
    replicated = layer.replicated + 3 * norm_parameters(shape)
    return LayerParameters(layer.sharded + product, replicated, layer.expert, layer.down)


def count_parameters(shape: Shape, context_length: int) -> int:
    """All trainable parameters, without padding of the vocabulary. `context_length` counts for learned positions alone."""
    matrices = 1 if shape.tied_embeddings else 2
    mixtures = num_mixtures(shape)
    return (
        matrices * shape.vocab_size * shape.hidden_size
        + position_parameters(shape, context_length)
        + (shape.num_layers - mixtures) * layer_parameters(shape, mixture=False).total
        + mixtures * layer_parameters(shape, mixture=True).total
        + shape.mtp_layers * mtp_parameters(shape).total
        + norm_parameters(shape)
    )


def count_active_parameters(shape: Shape, context_length: int) -> int:
    """Parameters that one token uses: all of a dense model, `experts_per_token` of the experts of a mixture."""
    idle = (shape.num_experts - shape.experts_per_token) * expert_parameters(shape)
    return count_parameters(shape, context_length) - (num_mixtures(shape) + shape.mtp_layers) * idle


def expert_parameters(shape: Shape) -> int:
    """Parameters of one expert of one mixture; 0 in a dense model."""
    return _ffn(shape, shape.expert_ffn_hidden_size)


@dataclass(frozen=True)
class UsedMatrices:
    """Parameters of one layer's matrices that one token meets, by module. Latent attention's projections `down` and the `router`
    may be whole on every tensor rank, which then works on its own tokens (layout_rules: both need sequence parallelism); `up`, a
    part of `attention`, are its projections up."""

    attention: int  # without `down`
    down: int
    up: int
    ffn: int  # of a dense layer
    experts: int
    shared_experts: int
    router: int


def matrices_by_module(shape: Shape, *, mixture: bool) -> UsedMatrices:
    """The matrices of one layer that one token meets."""
    down = up = 0
    if shape.kv_lora_rank:
        down = shape.hidden_size * (shape.kv_lora_rank + shape.qk_rope_head_dim + shape.q_lora_rank)
        up = shape.kv_lora_rank * shape.num_attention_heads * (shape.head_dim + shape.v_head_dim)
        up += (shape.q_lora_rank or shape.hidden_size) * query_size(shape)
        attention = up + value_size(shape) * shape.hidden_size
    else:
        attention = 2 * shape.hidden_size * (query_size(shape) + key_size(shape))
    return UsedMatrices(
        attention=attention,
        down=down,
        up=up,
        ffn=0 if mixture else _ffn(shape, shape.ffn_hidden_size),
        experts=shape.experts_per_token * expert_parameters(shape) if mixture else 0,
        shared_experts=_ffn(shape, shape.shared_ffn_hidden_size) if mixture else 0,
        router=shape.hidden_size * shape.num_experts if mixture else 0,
    )


def used_matrices(shape: Shape, *, mixture: bool) -> int:
    """Parameters of one layer's matrices that one token uses, the router's left out."""
    used = matrices_by_module(shape, mixture=mixture)
    return used.attention + used.down + used.ffn + used.experts + used.shared_experts


def count_body_parameters(shape: Shape) -> int:
    """Parameters of the layers' matrices that one token uses: N without embedding and output layer, as Step Law counts."""
    mixtures = num_mixtures(shape)
    dense = (shape.num_layers - mixtures) * used_matrices(shape, mixture=False)
    return dense + mixtures * used_matrices(shape, mixture=True)


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
            return (
                6.0 * count_body_parameters(shape)
                + 6.0 * shape.num_layers * (query_size(shape) + value_size(shape)) * context_length
            )
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


def device_parameters(
    shape: Shape, context_length: int, layouts: Layouts, rank: Ints, *, local_layers: bool = False
) -> DeviceParameters:
    """Parameters on a device of a pipeline rank (a column), vocabulary padded.

    The first holds the embedding and learned positions, the last the final norm and the output layer; a tied output layer is
    a second copy where the ranks differ (Megatron-Core, `share_embeddings_and_output_weights`), and so is the embedding that
    multi-token prediction looks up in.
    """
    held = layers_on(shape, layouts, rank)
    kinds = [
        (held.dense, layer_parameters(shape, mixture=False)),
        (held.mixtures, layer_parameters(shape, mixture=True)),
        (shape.mtp_layers * (rank == layouts.pipeline - 1.0), mtp_parameters(shape)),
    ]
    single = layouts.pipeline == 1
    has_embedding, has_output = rank == 0, rank == layouts.pipeline - 1
    copies = has_embedding * 1.0 + np.where(single, not shape.tied_embeddings, has_output)
    looks_up_again = (shape.mtp_layers > 0) * (has_output & ~single)
    copies = copies + (not shape.tied_embeddings) * looks_up_again
    dense = (
        sum(layers * one.dense_on(layouts.tensor, local_layers=local_layers) for layers, one in kinds)
        + copies * (layouts.padded_vocab_size * shape.hidden_size / layouts.tensor)
        + (1 * has_embedding + looks_up_again) * position_parameters(shape, context_length)
        + has_output * norm_parameters(shape)
    )
    experts = sum(layers * float(one.expert) for layers, one in kinds) / (layouts.expert_tensor * layouts.expert)
    return DeviceParameters(np.asarray(dense), np.asarray(experts))


def pad_count(shape: Shape, parameters: int, padded_vocab_size: int) -> int:
    """Parameters of a model with its vocabulary padded."""
    matrices = 1 if shape.tied_embeddings else 2
    return parameters + matrices * (padded_vocab_size - shape.vocab_size) * shape.hidden_size


def query_size(shape: Shape) -> int:
    """Width of all queries together: heads x head_dim, with latent attention the part with positions too."""
    return shape.num_attention_heads * (shape.head_dim + shape.qk_rope_head_dim)


def value_size(shape: Shape) -> int:
    """Width of what all heads attend to together, and the output projection reads."""
    return shape.num_attention_heads * (shape.v_head_dim or shape.head_dim)


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
