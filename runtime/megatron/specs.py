"""Which modules the layers of a model are made of: Megatron-Core's layer specs, with the runtime's own norms and attention."""

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.layers import CausalAttention, Norm
from trainwright.runtime.megatron.platform import Literals


def layer_specs(literals: Literals, positions: str, chunk: int | None) -> Any:
    """The layers and final norm of a chunk of this pipeline stage (None: it has one), for GPTModel.

    `positions` are Embedding's. Raises Unsupported for a layer spec that is unknown.
    """
    config = literals.model
    alibi = positions == "alibi"
    if literals.layer_spec == "transformer_engine":
        if alibi:
            raise Unsupported(
                "ALiBi is a bias of the runtime's own attention, and layer_spec='transformer_engine' has another: "
                "write layer_spec='local'"
            )
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    if literals.layer_spec != "local":
        raise Unsupported(f"layer_spec={literals.layer_spec!r} is unknown: write 'local' or 'transformer_engine'")
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = partial(CausalAttention, alibi=alibi)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    # Given whole, a block's submodules also name its final norm; a bare layer spec would get Megatron-Core's own.
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=chunk), layer_norm=Norm
    )
