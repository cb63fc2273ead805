"""Which of the Hugging Face formats that the runtime's export writes (runtime/megatron/huggingface) has a place for a model."""

from collections.abc import Callable, Mapping

from trainwright.compiler.plan import Shape, Training

_Foreign = Mapping[str, bool]  # {what: whether the model has it}
# Whole parts of a model: of two formats the one that has all of these is nearer, whatever it lacks beside them.
_PARTS = frozenset({"latent attention", "no latent attention", "a mixture of experts", "no experts"})
_BEST_OF_A_GROUP = 2  # DeepSeek-V3's router: a group of experts counts by the scores of its best two


def foreign_to_export(shape: Shape, training: Training) -> tuple[str, list[str]]:
    """(the format nearest to a model, what of the model has no place in it): an empty list where all has one."""
    width = training.mup_width
    wide = {
        f"logits x {1 / width:g} (muP) with an output layer that is the embedding": width != 1.0
        and shape.tied_embeddings
    }
    found = {
        name: [what for what, holds in {**foreign(shape), **wide}.items() if holds] for name, foreign in FORMATS.items()
    }
    nearest = min(found, key=lambda name: (len(_PARTS.intersection(found[name])), len(found[name])))
    return nearest, found[nearest]


def _decoder(*, qkv_bias: bool = False, qk_norm: bool = False, mixture: str = "") -> Callable[[Shape], _Foreign]:
    """Llama's kind: RMSNorm, RoPE, gated FFNs. `mixture`: the format of its experts, "mixtral" | "qwen"; "": dense."""

    def foreign(shape: Shape) -> _Foreign:
        experts = shape.num_experts > 0
        has_place = experts and bool(mixture)
        return {
            **_foreign_to_rmsnorm_decoders(shape),
            "latent attention": shape.kv_lora_rank > 0,
            "biases of queries, keys and values": shape.qkv_bias and not qkv_bias,
            "no biases of queries, keys and values": qkv_bias and not shape.qkv_bias,
            "normalised queries and keys": shape.qk_norm and not qk_norm,
            "queries and keys that are not normalised": qk_norm and not shape.qk_norm,
            "a mixture of experts": experts and not mixture,
            "no experts": bool(mixture) and not experts,
            "dense layers among those of experts": mixture == "mixtral" and _has_dense_layers(shape),
            "shared experts": has_place and shape.shared_ffn_hidden_size > 0,
            f"a {shape.router_score} router": has_place and shape.router_score != "softmax",
            "a softmax over all experts": mixture == "mixtral" and shape.router_pre_softmax,
            "scaled router weights": has_place and shape.router_scaling != 1.0,
            "groups of experts": has_place and shape.router_groups > 0,
            "expert biases": has_place and shape.router_bias,
            "router weights on the experts' input": has_place and shape.router_on_input,
        }

    return foreign


def _foreign_to_rmsnorm_decoders(shape: Shape) -> _Foreign:
    return {
        f"{shape.positions} positions": shape.positions != "rope",
        shape.normalization: shape.normalization != "RMSNorm",
        "norms around 1": shape.zero_centered_norm,
        "an FFN without gate": not shape.gated,
        f"the activation {shape.activation}": shape.activation != "silu",
        "biases in the linear layers": shape.linear_bias,
        "queries and keys of unit length": shape.qk_l2_norm,
        "layers without positions": shape.no_rope_every > 0,
        "the prediction of further tokens": shape.mtp_layers > 0,
    }


def _deepseek(shape: Shape) -> _Foreign:
    best, groups = shape.experts_per_token, shape.router_group_topk
    shared, ffn = shape.shared_ffn_hidden_size, shape.expert_ffn_hidden_size
    return {
        **_foreign_to_rmsnorm_decoders(shape),
        "no latent attention": shape.kv_lora_rank == 0,
        "latents that are not normalised": not shape.qk_norm,
        "no experts": shape.num_experts == 0,
        "dense layers after those of experts": shape.num_experts > 0 and shape.moe_every > 1,
        f"a {shape.router_score} router": shape.router_score != "sigmoid",
        "groups by other than the best two experts": groups > 0 and best // groups != _BEST_OF_A_GROUP,
        f"shared experts of {shared}": shape.num_experts > 0 and (shared == 0 or shared % ffn > 0),
        "router weights on the experts' input": shape.router_on_input,
        "no expert biases": not shape.router_bias,
        "one expert a token": best == 1,
    }


def _gpt2(shape: Shape) -> _Foreign:
    return {
        f"{shape.positions} positions": shape.positions != "learned",
        shape.normalization: shape.normalization != "LayerNorm",
        "norms around 1": shape.zero_centered_norm,
        "a gated FFN": shape.gated,
        f"the activation {shape.activation}": shape.activation not in ("gelu", "gelu_tanh"),
        "linear layers without biases": not shape.linear_bias,
        "normalised queries and keys": shape.qk_norm or shape.qk_l2_norm,
        "grouped queries": shape.num_query_groups != shape.num_attention_heads,
        f"heads of {shape.head_dim}": shape.num_attention_heads * shape.head_dim != shape.hidden_size,
        "latent attention": shape.kv_lora_rank > 0,
        "a mixture of experts": shape.num_experts > 0,
        "the prediction of further tokens": shape.mtp_layers > 0,
    }


def _has_dense_layers(shape: Shape) -> bool:
    return shape.num_experts > 0 and (shape.first_dense_layers > 0 or shape.moe_every > 1)


FORMATS: Mapping[str, Callable[[Shape], _Foreign]] = {
    "Llama": _decoder(),
    "Qwen2": _decoder(qkv_bias=True),
    "Qwen3": _decoder(qk_norm=True),
    "Mixtral": _decoder(mixture="mixtral"),
    "Qwen3Moe": _decoder(qk_norm=True, mixture="qwen"),
    "DeepseekV3": _deepseek,
    "GPT2": _gpt2,
}
