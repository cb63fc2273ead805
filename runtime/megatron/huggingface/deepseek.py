"""DeepSeek-V3's format: latent attention, a mixture with shared experts whose router is a biased sigmoid.

Sources: `DeepseekV3ForCausalLM` of transformers 5.24, Megatron-Core 0.16.1's `MLASelfAttention`, `MoELayer` and
`group_limited_topk`. Both turn the rotary part of queries and keys by pairs of neighbours.
"""

from collections.abc import Iterator

from trainwright.runtime.megatron.huggingface.decoders import (
    QWEN,
    expert_rules,
    ffn_rules,
    foreign_to_rmsnorm_decoders,
    norm_rules,
    outer_rules,
    read_embedding,
    rmsnorm_config,
    rmsnorm_fields,
    unlike_rmsnorm_decoders,
)
from trainwright.runtime.megatron.huggingface.formats import Format, Json, listed, refuse_if
from trainwright.runtime.megatron.huggingface.rules import Rule, same
from trainwright.runtime.megatron.model_files import SavedModel

_BEST_OF_A_GROUP = 2  # experts by whose scores a group of them is chosen
_LATENT = {  # ours: theirs, of a layer's attention
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}


def _foreign(model: SavedModel) -> list[str]:
    config = model.config
    found = foreign_to_rmsnorm_decoders(model) | {
        "no latent attention": not config.get("multi_latent_attention"),
        "latents that are not normalised": not config["qk_layernorm"],
        "a RoPE of another kind": config.get("rope_type", "rope") != "rope",
        "no experts": not config.get("num_moe_experts"),
    }
    return listed(found | (_foreign_mixture(model) if config.get("num_moe_experts") else {}))


def _foreign_mixture(model: SavedModel) -> dict[str, bool]:
    config = model.config
    layers, best = config["moe_layer_freq"], config["moe_router_topk"]
    groups, of = config.get("moe_router_num_groups"), config.get("moe_router_group_topk")
    shared, ffn = config.get("moe_shared_expert_intermediate_size") or 0, config["moe_ffn_hidden_size"]
    return {
        "dense layers after those of experts": layers != sorted(layers),
        f"a {config['moe_router_score_function']} router": config["moe_router_score_function"] != "sigmoid",
        f"groups by the best {best // (of or best)} of {best} experts": bool(groups) and best // of != _BEST_OF_A_GROUP,
        f"shared experts of {shared}": not shared or bool(shared % ffn),
        "router weights on the experts' input": bool(config.get("moe_apply_probs_on_input")),
        "no expert biases": not config.get("moe_router_enable_expert_bias"),
        "one expert a token": best == 1,  # whose weight Megatron-Core does not bring to 1
    }


def _config(model: SavedModel) -> Json:
    config = model.config
    return rmsnorm_config(model) | {
        "attention_bias": False,
        "first_k_dense_replace": config["moe_layer_freq"].count(0),
        "head_dim": config["qk_pos_emb_head_dim"],
        "intermediate_size": config["ffn_hidden_size"],
        "kv_lora_rank": config["kv_lora_rank"],
        "moe_intermediate_size": config["moe_ffn_hidden_size"],
        "n_group": config.get("moe_router_num_groups") or 1,
        "n_routed_experts": config["num_moe_experts"],
        "n_shared_experts": config["moe_shared_expert_intermediate_size"] // config["moe_ffn_hidden_size"],
        "norm_topk_prob": True,
        "num_experts_per_tok": config["moe_router_topk"],
        "num_key_value_heads": config["num_attention_heads"],
        "num_nextn_predict_layers": 0,
        "q_lora_rank": config.get("q_lora_rank"),
        "qk_nope_head_dim": config["qk_head_dim"],
        "qk_rope_head_dim": config["qk_pos_emb_head_dim"],
        "rope_interleave": True,
        "routed_scaling_factor": config.get("moe_router_topk_scaling_factor") or 1.0,
        "topk_group": config.get("moe_router_group_topk") or 1,
        "v_head_dim": config["v_head_dim"],
    }


def _model(config: Json) -> SavedModel:
    groups = config.get("n_group") or 1
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 3)
    best, of = config["num_experts_per_tok"], config.get("topk_group") or 1
    refuse_if(
        listed(
            unlike_rmsnorm_decoders(config)
            | {
                "norm_topk_prob false": not config.get("norm_topk_prob", True),
                "rope_interleave false": not config.get("rope_interleave", True),
                f"topk_group {of} of {best} experts": groups > 1 and best // of != _BEST_OF_A_GROUP,
                "one expert a token": best == 1,
            }
        ),
        config,
    )
    embedding = read_embedding(config, 10_000)
    fields = rmsnorm_fields(config) | {
        "ffn_hidden_size": config["intermediate_size"],
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "multi_latent_attention": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rope_type": "rope",
        "rotary_base": embedding.rotary_base,
        "num_moe_experts": config.get("n_routed_experts", config.get("num_local_experts")),
        "moe_router_topk": best,
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": [int(number >= dense) for number in range(layers)],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": of if groups > 1 else None,
        "moe_router_enable_expert_bias": True,
    }
    kept = ("softmax_scale", "q_lora_rank")  # whose None says something
    return SavedModel({name: value for name, value in fields.items() if value is not None or name in kept}, embedding)


def _rules(model: SavedModel) -> Iterator[Rule]:
    config = model.config
    latent = dict(_LATENT)
    if not config.get("q_lora_rank"):
        del latent["linear_q_down_proj"], latent["q_layernorm"], latent["linear_q_up_proj"]
        latent["linear_q_proj"] = "q_proj"
    yield from outer_rules(model)
    for number in range(config["num_layers"]):
        ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        yield from norm_rules(ours, theirs)
        for name, their_name in latent.items():
            yield same(f"{ours}self_attention.{name}.weight", f"{theirs}self_attn.{their_name}.weight")
        ours, theirs = f"{ours}mlp.", f"{theirs}mlp."
        if not config["moe_layer_freq"][number]:
            yield from ffn_rules(ours, theirs)
            continue
        yield from expert_rules(model, QWEN, ours, theirs)
        yield same(f"{ours}router.expert_bias", f"{theirs}gate.e_score_correction_bias")
        yield from ffn_rules(f"{ours}shared_experts.", f"{theirs}shared_experts.")


DEEPSEEK = Format("DeepseekV3ForCausalLM", "deepseek_v3", _foreign, _config, _model, _rules)
