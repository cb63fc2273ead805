"""Which modules the layers of a model are made of: Megatron-Core's layer specs, with the runtime's own norms and attention.

Each layer has a spec of its own: dense or a mixture of experts, with or without rotary positions.
"""

import copy
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.experts import Router
from trainwright.runtime.megatron.latent import LatentAttention
from trainwright.runtime.megatron.layers import CausalAttention, Norm
from trainwright.runtime.megatron.platform import Literals


def layer_specs(literals: Literals, positions: str, chunk: int | None) -> Any:
    """The layers and final norm of a chunk of this pipeline stage (None: it has one), for GPTModel.

    `positions` are Embedding's. Raises Unsupported for a layer spec that is unknown.
    """
    layers = _all_layers(literals, alibi=positions == "alibi")
    mine = [layers[number] for number in _layer_numbers(literals.model, chunk)]
    if literals.layer_spec == "local":
        return TransformerBlockSubmodules(layer_specs=mine, layer_norm=Norm)
    # For its final norm:
    block = get_gpt_decoder_block_spec(literals.model, use_transformer_engine=True, vp_stage=chunk)
    block.layer_specs = mine
    return block


def prediction_specs(literals: Literals, positions: str, chunk: int | None) -> Any | None:
    """The layers that predict further tokens (MTP), made as the model's last layer is; None: this chunk has none."""
    if not literals.model.mtp_num_layers:
        return None
    local = literals.layer_spec == "local"
    last = _all_layers(literals, alibi=positions == "alibi")[-1]
    block = get_gpt_mtp_block_spec(literals.model, last, use_transformer_engine=not local, vp_stage=chunk)
    for layer in block.layer_specs if block and local else ():
        layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = Norm
    return block


def _all_layers(literals: Literals, *, alibi: bool) -> list[Any]:
    """A spec for each layer of the whole model."""
    config, local = literals.model, literals.layer_spec == "local"
    if not local and literals.layer_spec != "transformer_engine":
        raise Unsupported(f"layer_spec={literals.layer_spec!r} is unknown: write 'local' or 'transformer_engine'")
    if alibi and not local:
        raise Unsupported(
            "ALiBi is a bias of the runtime's own attention, and layer_spec='transformer_engine' has another: "
            "write layer_spec='local'"
        )
    shared = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=not local,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    layers = [copy.deepcopy(layer) for layer in shared]
    for number, layer in enumerate(layers):
        parts = layer.submodules
        if parts.mlp.module is MoELayer:
            parts.mlp.submodules.router = Router
        if local:
            _make_local(config, parts, alibi=alibi)
        if config.qk_l2_norm and config.no_rope_freq and config.no_rope_freq[number]:
            # Llama 4 normalises queries and keys where they carry positions (transformers' Llama4TextAttention).
            parts.self_attention.submodules.q_layernorm = IdentityOp
            parts.self_attention.submodules.k_layernorm = IdentityOp
    return layers


def _make_local(config: Any, parts: Any, *, alibi: bool) -> None:
    """Put the runtime's own norms and attention into a layer, and name its tensors in checkpoints as Transformer Engine's
    layers do, which hold some norms in the linear layer that follows."""
    attention, names = parts.self_attention.submodules, {}
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    if config.multi_latent_attention:
        _check_latent(config)
        attention.core_attention = LatentAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.kv_layernorm = Norm
            names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
            names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        attention.core_attention = partial(CausalAttention, alibi=alibi)
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = Norm
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if parts.mlp.module is not MoELayer:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = names


def _check_latent(config: Any) -> None:
    """The local layers cut down-projections over tensor ranks; Transformer Engine's are whole on each."""
    tensor, rotary = config.tensor_model_parallel_size, config.qk_pos_emb_head_dim
    for name, size in (
        ("q_lora_rank", config.q_lora_rank or 0),
        (f"kv_lora_rank {config.kv_lora_rank} + qk_pos_emb_head_dim {rotary} =", config.kv_lora_rank + rotary),
    ):
        if size % tensor:
            raise Unsupported(
                f"{name} {size} is not divisible by tensor {tensor}, as layer_spec='local' needs it: "
                f"{size} = {size // tensor} x {tensor} + {size % tensor}"
            )


def _layer_numbers(config: Any, chunk: int | None) -> range:
    """The layers of a chunk, counted from 0 over the whole model."""
    first = get_transformer_layer_offset(config, vp_stage=chunk)
    return range(first, first + get_num_layers_to_build(config, vp_stage=chunk))
