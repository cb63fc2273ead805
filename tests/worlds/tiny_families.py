"""Tiny members of families, as Megatron-Core's configs: Gemma's, and those with experts, latent attention and prediction of
further tokens."""

from typing import Any

import torch
from megatron.core.activations import fast_gelu

LLAMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
}
EXPERTS: dict[str, Any] = {
    "moe_router_dtype": "fp32",
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 64,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 32,
    "kv_lora_rank": 40,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "rope_type": "rope",
}
SIGMOID_WITH_BIAS: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.02,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 32,
    "moe_layer_freq": [0, 1, 1, 1],
}
AUXILIARY: dict[str, Any] = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02}

GEMMA: dict[str, Any] = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": True,
    "gated_linear_unit": True,
    "activation_func": fast_gelu,
    "add_bias_linear": False,
    "num_query_groups": 2,
    "kv_channels": 32,  # not hidden_size / num_attention_heads
}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**LLAMA, **EXPERTS, **AUXILIARY, "num_query_groups": 2, "moe_z_loss_coeff": 0.01},
    "qwen3moe": {**LLAMA, **EXPERTS, **AUXILIARY, "num_query_groups": 2, "qk_layernorm": True},
    "llama4": {
        **LLAMA,
        **EXPERTS,
        "num_query_groups": 2,
        "qk_l2_norm": True,
        "no_rope_freq": 4,
        "moe_layer_freq": [0, 1, 0, 1],
        "moe_router_topk": 1,
        "moe_router_score_function": "sigmoid",
        "moe_apply_probs_on_input": True,
        "moe_shared_expert_intermediate_size": 64,
    },
    "deepseek": {
        **LLAMA,
        **EXPERTS,
        **LATENT,
        **SIGMOID_WITH_BIAS,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "mtp_num_layers": 1,
        "mtp_loss_scaling_factor": 0.3,
    },
    "kimi": {**LLAMA, **EXPERTS, **LATENT, **SIGMOID_WITH_BIAS, "rope_type": "yarn", "rotary_scaling_factor": 4.0},
    "latent": {
        **LLAMA,
        **LATENT,
        "q_lora_rank": None,
    },  # dense; queries in full, as DeepSeek-V2-Lite and Moonlight have them
}
