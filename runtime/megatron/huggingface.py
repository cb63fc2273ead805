"""A GPT's weights and config as Hugging Face has them: `LlamaForCausalLM`, or `Qwen3ForCausalLM` with QK norm.

Sources: `LlamaModel` and `Qwen3Model` of transformers 4.57 to 5.24, and Megatron-Core 0.16.1's `SelfAttention` and `MLP`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.model import Embedding


def check_expressible(config: Any, embedding: Embedding) -> None:
    """Raise Unsupported, with the list of what has no place in either format, before anything is computed.

    `config` is Megatron-Core's TransformerConfig. What a hand-edited program adds beyond these is found when logits are
    compared.
    """
    foreign = {
        f"{embedding.positions} positions": embedding.positions != "rope",
        f"{config.normalization}": config.normalization != "RMSNorm",
        "an FFN without gate": not config.gated_linear_unit,
        f"the activation {getattr(config.activation_func, '__name__', 'of its own')}": (
            config.activation_func is not torch.nn.functional.silu
        ),
        "biases in the linear layers": config.add_bias_linear,
        "biases of queries, keys and values": config.add_qkv_bias,
        "a mixture of experts": config.num_moe_experts is not None,
    }
    found = [what for what, is_foreign in foreign.items() if is_foreign]
    if found:
        raise Unsupported(
            f"the model has {', '.join(found)}: Hugging Face's Llama and Qwen3 formats have no place for that; "
            "export a model of the families llama, llama2 or qwen3"
        )


def model_config(config: Any, embedding: Embedding, *, dtype: str) -> dict[str, Any]:
    """What `config.json` says of the model: all but its tokens. `dtype` is the weights', e.g. "bfloat16"."""
    qwen = bool(config.qk_layernorm)
    values = {
        "architectures": ["Qwen3ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen else "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.init_method_std,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": embedding.sequence_length,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.layernorm_epsilon,
        "rope_theta": float(embedding.rotary_base),  # at the top level, where transformers 4 and 5 both find it
        "tie_word_embeddings": embedding.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": embedding.vocab_size,
    }
    return values | ({"use_sliding_window": False} if qwen else {"mlp_bias": False})


def named_weights(state: Mapping[str, Tensor], config: Any, embedding: Embedding) -> Iterator[tuple[str, Tensor]]:
    """(name in Hugging Face's state dict, tensor) of a whole model's weights, first to last layer.

    `state` is `GPTModel.state_dict()` of one process, of the local or Transformer Engine's layer spec. Rows of the vocabulary
    that are padding are left out, and a tied output layer. Tensors are views of `state` where that is possible.
    """
    vocabulary = slice(embedding.vocab_size)
    yield "model.embed_tokens.weight", state["embedding.word_embeddings.weight"][vocabulary]
    for number in range(config.num_layers):
        layer = {
            name.removeprefix(f"decoder.layers.{number}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"decoder.layers.{number}.")
        }
        for name, tensor in _layer(layer, config):
            yield f"model.layers.{number}.{name}", tensor
    yield "model.norm.weight", state["decoder.final_layernorm.weight"]
    if not embedding.tied:
        yield "lm_head.weight", state["output_layer.weight"][vocabulary]


def _layer(layer: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, Tensor]]:
    yield (
        "input_layernorm.weight",
        _norm(layer, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    )
    # Rows of a query group stand together: its query heads, then its key head, then its value head.
    heads_a_group = config.num_attention_heads // config.num_query_groups
    groups = layer["self_attention.linear_qkv.weight"].view(
        config.num_query_groups, heads_a_group + 2, config.kv_channels, config.hidden_size
    )
    for name, heads in (
        ("q_proj", groups[:, :heads_a_group]),
        ("k_proj", groups[:, heads_a_group]),
        ("v_proj", groups[:, heads_a_group + 1]),
    ):
        yield f"self_attn.{name}.weight", heads.reshape(-1, config.hidden_size)
    if config.qk_layernorm:
        yield "self_attn.q_norm.weight", layer["self_attention.q_layernorm.weight"]
        yield "self_attn.k_norm.weight", layer["self_attention.k_layernorm.weight"]
    yield "self_attn.o_proj.weight", layer["self_attention.linear_proj.weight"]
    yield (
        "post_attention_layernorm.weight",
        _norm(layer, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    )
    gate, up = layer["mlp.linear_fc1.weight"].chunk(2)
    yield "mlp.gate_proj.weight", gate
    yield "mlp.up_proj.weight", up
    yield "mlp.down_proj.weight", layer["mlp.linear_fc2.weight"]


def _norm(layer: Mapping[str, Tensor], local: str, fused: str) -> Tensor:
    """A norm stands for itself in the local layer spec, and in the linear layer after it in Transformer Engine's."""
    return layer[local] if local in layer else layer[fused]
