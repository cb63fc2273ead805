"""GPT-2's format: learned positions, LayerNorm, biases everywhere, Conv1D instead of linear layers.

Sources: `GPT2LMHeadModel` of transformers 5.24, Megatron-Core 0.16.1's `SelfAttention` and `MLP`. Its gelu_new is the tanh
approximation, Megatron-Core's fast_gelu; torch's own gelu is exact.
"""

from collections.abc import Iterator

from trainwright.runtime.megatron.huggingface.formats import Format, Json, listed, refuse_if
from trainwright.runtime.megatron.huggingface.rules import Heads, Rule, same, transposed, vocabulary
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.model_files import ACTIVATIONS, SavedModel, activation_name

ACTIVATION = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # theirs: ours
_CLOSE = ("weight", "bias")


def _foreign(model: SavedModel) -> list[str]:
    config = model.config
    heads, size = config["num_attention_heads"], config.get("kv_channels")
    activation = config["activation_func"]
    return listed(
        {
            f"{model.embedding.positions} positions": model.embedding.positions != "learned",
            f"{config['normalization']}": config["normalization"] != "LayerNorm",
            "norms around 1": bool(config["layernorm_zero_centered_gamma"]),
            "a gated FFN": config["gated_linear_unit"],
            f"the activation {activation_name(activation)}": _theirs(activation) is None,
            "linear layers without biases": not config["add_bias_linear"],
            "normalised queries and keys": bool(config["qk_layernorm"] or config.get("qk_l2_norm")),
            "grouped queries": config.get("num_query_groups") != heads,
            f"heads of {size}": size is not None and heads * size != config["hidden_size"],
            "latent attention": bool(config.get("multi_latent_attention")),
            "a mixture of experts": bool(config.get("num_moe_experts")),
            "the prediction of further tokens": bool(config.get("mtp_num_layers")),
            "a softmax scale of its own": config["softmax_scale"] is not None,
        }
    )


def _config(model: SavedModel) -> Json:
    config, embedding = model.config, model.embedding
    return {
        "activation_function": _theirs(config["activation_func"]),
        "layer_norm_epsilon": config["layernorm_epsilon"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["ffn_hidden_size"],
        "n_layer": config["num_layers"],
        "n_positions": embedding.sequence_length,
        "tie_word_embeddings": embedding.tied,
        "use_cache": True,
        "vocab_size": embedding.vocab_size,
    }


def _model(config: Json) -> SavedModel:
    activation, heads, hidden = config.get("activation_function", "gelu_new"), config["n_head"], config["n_embd"]
    refuse_if(
        listed(
            {
                f"activation_function {activation}": activation not in ACTIVATION,
                "scale_attn_by_inverse_layer_idx": bool(config.get("scale_attn_by_inverse_layer_idx")),
                "scale_attn_weights false": not config.get("scale_attn_weights", True),
                "add_cross_attention": bool(config.get("add_cross_attention")),
                "quantization_config": bool(config.get("quantization_config")),
            }
        ),
        config,
    )
    fields = {
        "num_layers": config["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": config.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
        "normalization": "LayerNorm",
        "layernorm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "layernorm_zero_centered_gamma": False,
        "qk_layernorm": False,
        "gated_linear_unit": False,
        "activation_func": ACTIVATIONS.get(ACTIVATION[activation]),
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "rotary_interleaved": False,
        "softmax_scale": None,
    }
    embedding = Embedding(
        vocab_size=config["vocab_size"],
        padded_vocab_size=config["vocab_size"],
        sequence_length=config["n_positions"],
        positions="learned",
        rotary_base=0,
        tied=bool(config.get("tie_word_embeddings", True)),
    )
    return SavedModel(fields, embedding)


def _rules(model: SavedModel) -> Iterator[Rule]:
    config, rows = model.config, model.embedding.vocab_size
    heads = Heads(config["num_attention_heads"], 1, config["kv_channels"])
    yield vocabulary("embedding.word_embeddings.weight", "transformer.wte.weight", rows)
    yield same("embedding.position_embeddings.weight", "transformer.wpe.weight")
    for number in range(config["num_layers"]):
        ours, theirs = f"decoder.layers.{number}.", f"transformer.h.{number}."
        for norm, their_norm in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            yield from (same(f"{ours}{norm}.{kind}", f"{theirs}{their_norm}.{kind}") for kind in _CLOSE)
        yield from (
            heads.one_conv(f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.c_attn.{kind}") for kind in _CLOSE
        )
        for layer, their_layer in (
            ("self_attention.linear_proj", "attn.c_proj"),
            ("mlp.linear_fc1", "mlp.c_fc"),
            ("mlp.linear_fc2", "mlp.c_proj"),
        ):
            yield transposed(f"{ours}{layer}.weight", f"{theirs}{their_layer}.weight")
            yield same(f"{ours}{layer}.bias", f"{theirs}{their_layer}.bias")
    yield from (same(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}") for kind in _CLOSE)
    if not model.embedding.tied:
        yield vocabulary("output_layer.weight", "lm_head.weight", rows)


def _theirs(activation: object) -> str | None:
    """Their name of an activation: of those that mean the same the first."""
    return next((theirs for theirs, ours in ACTIVATION.items() if ACTIVATIONS.get(ours) is activation), None)


GPT2 = Format("GPT2LMHeadModel", "gpt2", _foreign, _config, _model, _rules, prefix="transformer.")
