"""Formats of pre-norm decoders with RMSNorm, RoPE and gated FFNs: Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE.

Sources: the models of these names in transformers 4.57 to 5.24, and Megatron-Core 0.16.1's `SelfAttention`, `MLP`, `MoELayer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trainwright.runtime.megatron.huggingface.formats import Format, Json, listed, read_rope, refuse_if, write_rope
from trainwright.runtime.megatron.huggingface.rules import Heads, Rule, same, upon_each_other, vocabulary
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.model_files import SavedModel, activation_name


@dataclass(frozen=True)
class Experts:
    """How a format spells a mixture of experts."""

    block: str  # of a layer
    gate: str  # an expert's projections
    up: str
    down: str
    number: str  # keys of config.json
    ffn: str


MIXTRAL = Experts("block_sparse_moe", "w1", "w3", "w2", "num_local_experts", "intermediate_size")
QWEN = Experts("mlp", "gate_proj", "up_proj", "down_proj", "num_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Decoder:
    """One of these formats: what its models have, all of them or none."""

    architecture: str
    model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    rope_base: int = 10_000  # where config.json says nothing

    def as_format(self) -> Format:
        return Format(self.architecture, self.model_type, self.foreign, self.config, self.model, self.rules)

    def foreign(self, model: SavedModel) -> list[str]:
        config = model.config
        experts, bias, norm = config.get("num_moe_experts"), config["add_qkv_bias"], config["qk_layernorm"]
        found = foreign_to_rmsnorm_decoders(model)
        found |= {
            "latent attention": bool(config.get("multi_latent_attention")),
            "biases of queries, keys and values": bias and not self.qkv_bias and not config["add_bias_linear"],
            "no biases of queries, keys and values": self.qkv_bias and not bias,
            "normalised queries and keys": norm and not self.qk_norm,
            "queries and keys that are not normalised": self.qk_norm and not norm,
            "a mixture of experts": bool(experts) and not self.experts,
            "no experts": bool(self.experts) and not experts,
        }
        return listed(found | (self._foreign_mixture(model) if experts and self.experts else {}))

    def _foreign_mixture(self, model: SavedModel) -> dict[str, bool]:
        config = model.config
        return {
            "dense layers among those of experts": self.experts is MIXTRAL and not all(config["moe_layer_freq"]),
            "shared experts": bool(config.get("moe_shared_expert_intermediate_size")),
            f"a {config['moe_router_score_function']} router": config["moe_router_score_function"] != "softmax",
            "a softmax over all experts": self.experts is MIXTRAL and bool(config.get("moe_router_pre_softmax")),
            "scaled router weights": config.get("moe_router_topk_scaling_factor") not in (None, 1.0),
            "groups of experts": bool(config.get("moe_router_num_groups")),
            "expert biases": bool(config.get("moe_router_enable_expert_bias")),
            "router weights on the experts' input": bool(config.get("moe_apply_probs_on_input")),
        }

    def config(self, model: SavedModel) -> Json:
        config = model.config
        values: Json = rmsnorm_config(model) | {
            "head_dim": config["kv_channels"],
            "intermediate_size": config["ffn_hidden_size"],
            "num_key_value_heads": config["num_query_groups"],
        }
        if self.model_type == "llama":
            values |= {"attention_bias": False, "mlp_bias": False}
        elif self.model_type != "mixtral":
            values |= {"attention_bias": False} if self.qk_norm else {}
            values |= {"use_sliding_window": False}
        if self.experts:
            values |= {
                self.experts.number: config["num_moe_experts"],
                "num_experts_per_tok": config["moe_router_topk"],
                self.experts.ffn: config["moe_ffn_hidden_size"],
                "output_router_logits": False,
            }
        if self.experts is QWEN:
            values |= {
                "decoder_sparse_step": 1,
                "mlp_only_layers": [number for number, mixture in enumerate(config["moe_layer_freq"]) if not mixture],
                "norm_topk_prob": not config.get("moe_router_pre_softmax"),
            }
        elif self.experts:
            values["sliding_window"] = None
        return values

    def model(self, config: Json) -> SavedModel:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        refuse_if(listed(_unlike_decoders(config)), config)
        layers = config["num_hidden_layers"]
        fields = rmsnorm_fields(config) | {
            "ffn_hidden_size": config["intermediate_size"],
            "num_query_groups": config.get("num_key_value_heads") or heads,
            "kv_channels": config.get("head_dim") or hidden // heads,
            "qk_layernorm": self.qk_norm,
            "add_qkv_bias": self.qkv_bias,
        }
        if self.experts:
            fields |= {
                # transformers 5 writes num_local_experts of every model
                "num_moe_experts": config.get(self.experts.number, config.get("num_local_experts")),
                "moe_router_topk": config["num_experts_per_tok"],
                "moe_ffn_hidden_size": config[self.experts.ffn],
                "moe_layer_freq": [int(number not in _dense_layers(config)) for number in range(layers)],
                "moe_router_score_function": "softmax",
            }
            if self.experts is QWEN and not config.get("norm_topk_prob", False):
                fields["moe_router_pre_softmax"] = True
        return SavedModel(fields, read_embedding(config, self.rope_base))

    def rules(self, model: SavedModel) -> Iterator[Rule]:
        config = model.config
        heads = Heads(
            config["num_query_groups"],
            config["num_attention_heads"] // config["num_query_groups"],
            config["kv_channels"],
        )
        yield from outer_rules(model)
        for number in range(config["num_layers"]):
            ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
            yield from norm_rules(ours, theirs)
            for kind in ("weight", "bias") if self.qkv_bias else ("weight",):
                names = (f"{theirs}self_attn.{part}_proj.{kind}" for part in "qkv")
                yield heads.apart(f"{ours}self_attention.linear_qkv.{kind}", *names)
            yield same(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight")
            if self.qk_norm:
                for part in "qk":
                    yield same(f"{ours}self_attention.{part}_layernorm.weight", f"{theirs}self_attn.{part}_norm.weight")
            if self.experts and config["moe_layer_freq"][number]:
                yield from expert_rules(model, self.experts, f"{ours}mlp.", f"{theirs}{self.experts.block}.")
            else:
                yield from ffn_rules(f"{ours}mlp.", f"{theirs}mlp.")


def foreign_to_rmsnorm_decoders(model: SavedModel) -> dict[str, bool]:
    """What none of these formats, nor DeepSeek's, has a place for: {what: whether the model has it}."""
    config, embedding = model.config, model.embedding
    activation = config["activation_func"]
    return {
        f"{embedding.positions} positions": embedding.positions != "rope",
        f"{config['normalization']}": config["normalization"] != "RMSNorm",
        "norms around 1": bool(config["layernorm_zero_centered_gamma"]),
        "an FFN without gate": not config["gated_linear_unit"],
        f"the activation {activation_name(activation)}": activation is not torch.nn.functional.silu,
        "biases in the linear layers": config["add_bias_linear"],
        "queries and keys of unit length": bool(config.get("qk_l2_norm")),
        "layers without positions": bool(config.get("no_rope_freq")),
        "the prediction of further tokens": bool(config.get("mtp_num_layers")),
        "a softmax scale of its own": config["softmax_scale"] is not None,
        "interleaved RoPE": bool(config["rotary_interleaved"]),
    }


def rmsnorm_config(model: SavedModel) -> Json:
    """What config.json says in all of these formats, and in DeepSeek's."""
    config, embedding = model.config, model.embedding
    return write_rope(model) | {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": config["hidden_size"],
        "max_position_embeddings": embedding.sequence_length,
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_layers"],
        "rms_norm_eps": config["layernorm_epsilon"],
        "tie_word_embeddings": embedding.tied,
        "use_cache": True,
        "vocab_size": embedding.vocab_size,
    }


def rmsnorm_fields(config: Json) -> dict[str, object]:
    """What model.json says of all of them."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "rotary_interleaved": False,
        "softmax_scale": None,
    }


def read_embedding(config: Json, rope_base: int) -> Embedding:
    base, scaling = read_rope(config, rope_base)
    return Embedding(
        vocab_size=config["vocab_size"],
        padded_vocab_size=config["vocab_size"],
        sequence_length=config["max_position_embeddings"],
        positions="rope",
        rotary_base=base,
        rotary_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def outer_rules(model: SavedModel) -> Iterator[Rule]:
    """Embedding, final norm, output layer."""
    rows = model.embedding.vocab_size
    yield vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", rows)
    yield same("decoder.final_layernorm.weight", "model.norm.weight")
    if not model.embedding.tied:
        yield vocabulary("output_layer.weight", "lm_head.weight", rows)


def norm_rules(ours: str, theirs: str) -> Iterator[Rule]:
    yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
    yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight")


def ffn_rules(
    ours: str, theirs: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Iterator[Rule]:
    yield upon_each_other(f"{ours}linear_fc1.weight", f"{theirs}{gate}.weight", f"{theirs}{up}.weight")
    yield same(f"{ours}linear_fc2.weight", f"{theirs}{down}.weight")


def expert_rules(model: SavedModel, experts: Experts, ours: str, theirs: str) -> Iterator[Rule]:
    """The router's weights and the experts'."""
    yield same(f"{ours}router.weight", f"{theirs}gate.weight")
    for number in range(model.config["num_moe_experts"]):
        yield from ffn_rules(
            f"{ours}experts.local_experts.{number}.",
            f"{theirs}experts.{number}.",
            experts.gate,
            experts.up,
            experts.down,
        )


def unlike_rmsnorm_decoders(config: Json) -> dict[str, bool]:
    """What a config.json may say that is none of these models: {what: whether it does}."""
    return {
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": bool(config.get("quantization_config")),
    }


def _unlike_decoders(config: Json) -> dict[str, bool]:
    slides = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    return unlike_rmsnorm_decoders(config) | {
        f"sliding_window {config.get('sliding_window')}": slides and not kinds,
        f"layers of {', '.join(kinds)}": bool(kinds),
    }


def _dense_layers(config: Json) -> set[int]:
    """The layers without experts (Qwen3-MoE; in Mixtral there are none)."""
    every = config.get("decoder_sparse_step", 1)
    sparse = {number for number in range(config["num_hidden_layers"]) if every and (number + 1) % every == 0}
    dense = set(range(config["num_hidden_layers"])) - sparse
    return dense | set(config.get("mlp_only_layers") or ())


DECODERS = tuple(
    decoder.as_format()
    for decoder in (
        Decoder("LlamaForCausalLM", "llama"),
        Decoder("Qwen2ForCausalLM", "qwen2", qkv_bias=True),
        Decoder("Qwen3ForCausalLM", "qwen3", qk_norm=True),
        Decoder("MixtralForCausalLM", "mixtral", experts=MIXTRAL, rope_base=1_000_000),
        Decoder("Qwen3MoeForCausalLM", "qwen3_moe", qk_norm=True, experts=QWEN),
    )
)
