"""What makes a checkpoint self-contained: files beside its weights that say which model they are, and how it is spoken to.

model.json            the literals that define the model, and its Embedding; not the layout, not the training
tokenizer.json        what its token ids mean
split.json            which groups of documents it has not seen (where its data were split by the pipeline)
chat_template.jinja   how a conversation becomes text (once it was tuned on conversations)
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import activations
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.model import Embedding, Model
from trainwright.runtime.step_folders import CANONICAL
from trainwright.runtime.workspace import write_atomically, write_json

TOKENIZER, SPLIT, CHAT_TEMPLATE = "tokenizer.json", "split.json", "chat_template.jinja"
# The fields of Megatron-Core's TransformerConfig without which the same weights would be another function.
DEFINING = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "gated_linear_unit",
    "activation_func",
    "add_bias_linear",
    "add_qkv_bias",
    "rotary_interleaved",
    "softmax_scale",
)
# Those that most models are without: described where they are set.
SPECIAL = (
    "qk_l2_norm",
    "no_rope_freq",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "rotary_base",
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "mtp_num_layers",
)
_YARN = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
ACTIVATIONS: dict[str, Any] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": activations.fast_gelu,  # Hendrycks and Gimpel's approximation, GPT-2's
    "quick_gelu": activations.quick_gelu,
    "squared_relu": activations.squared_relu,
}


@dataclass(frozen=True)
class ModelFiles:
    """What goes along with the weights."""

    tokenizer: Path
    split: Path | None  # None: the model's data were not split by the pipeline
    chat_template: str  # a Jinja template; "" before a tuning on conversations


@dataclass(frozen=True)
class SavedModel:
    """The model that a checkpoint holds."""

    config: dict[str, Any]  # fields of Megatron-Core's TransformerConfig
    embedding: Embedding

    def build_config(self, **more: Any) -> Any:
        """Megatron-Core's config of this model, with `more` fields: its layout and precision."""
        kind = MLATransformerConfig if self.config.get("multi_latent_attention") else TransformerConfig
        return kind(**self.config, **more)


def write_model_files(folder: Path, model: Model, files: ModelFiles) -> None:
    """Write them into a step folder. Raises CheckpointError where one that should go along is not there."""
    write_model(folder, describe(model.config, model.embedding))
    for source, name in ((files.tokenizer, TOKENIZER), (files.split, SPLIT)):
        if source is None:
            continue
        try:
            shutil.copyfile(source, folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{source} should go along with the checkpoint, and cannot be copied: {error}"
            ) from error
    if files.chat_template:
        write_atomically(folder / CHAT_TEMPLATE, files.chat_template)


def files_of(folder: Path) -> ModelFiles:
    """What lies beside the weights in a step folder. Raises CheckpointError where the tokenizer is missing."""
    if not (folder / TOKENIZER).exists():
        raise CheckpointError(f"{folder} has no {TOKENIZER}: copy there the one that the model was trained with")
    split, template = folder / SPLIT, folder / CHAT_TEMPLATE
    return ModelFiles(
        tokenizer=folder / TOKENIZER,
        split=split if split.exists() else None,
        chat_template=template.read_text(encoding="utf-8") if template.exists() else "",
    )


def read_model(folder: Path) -> SavedModel:
    """The model of a step folder. Raises CheckpointError where its description is missing or damaged."""
    path = folder / CANONICAL
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = dict(saved["config"])
        config["activation_func"] = ACTIVATIONS[config["activation_func"]]
        return SavedModel(config, Embedding(**saved["embedding"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not describe a model ({error}): it is written with every checkpoint"
        ) from error


def check_same_model(config: Any, embedding: Embedding, folder: Path) -> None:
    """Raise CheckpointError, with each field that differs, where a folder holds another model than a program's.

    `config` is Megatron-Core's TransformerConfig.
    """
    check_described(read_model(folder), describe(config, embedding), folder)


def check_described(there: SavedModel, here: SavedModel, folder: Path) -> None:
    """As `check_same_model`, of a model that was read already."""
    differing = differences(there, here)
    if differing:
        raise CheckpointError(
            f"{folder} is of another model: {'; '.join(differing)}. Write the values that it was trained with, or start "
            "from a checkpoint of this model"
        )


def differences(there: SavedModel, here: SavedModel) -> list[str]:
    """Each field by which a saved model differs from a program's, as "name: value there, value here"."""
    saved, ours = ({**model.config, **asdict(model.embedding)} for model in (there, here))
    del ours["padded_vocab_size"]  # the layout's
    if here.embedding.positions != "learned":  # any length can be asked of such a model
        del ours["sequence_length"]
    return [
        f"{name}: {_show(saved.get(name))} there, {_show(ours.get(name))} here"
        for name in dict.fromkeys([*ours, *(name for name in saved if name in SPECIAL)])
        if saved.get(name) != ours.get(name)
    ]


def describe(config: Any, embedding: Embedding) -> SavedModel:
    """What of a TransformerConfig defines the model: configs that compute the same are described alike."""
    fields = {name: getattr(config, name) for name in DEFINING} | _special(config)
    if config.bias_activation_fusion and config.activation_func is torch.nn.functional.gelu:
        fields["activation_func"] = ACTIVATIONS["gelu_tanh"]  # that is what Megatron-Core's fused kernel computes
    if config.softmax_scale is not None and math.isclose(config.softmax_scale, config.kv_channels**-0.5, rel_tol=1e-5):
        fields["softmax_scale"] = None  # the scale that it has anyway
    fields["add_qkv_bias"] = config.add_qkv_bias or config.add_bias_linear
    fields["ffn_hidden_size"] = ffn_of_dense_layers(fields)
    if config.multi_latent_attention:
        del fields["num_query_groups"], fields["kv_channels"]
    return SavedModel(fields, embedding)


def ffn_of_dense_layers(fields: Mapping[str, Any]) -> int:
    """ffn_hidden_size; where all layers are mixtures, which makes it nobody's, the experts'."""
    mixtures_alone = all(fields.get("moe_layer_freq", [0]))
    return int(fields["moe_ffn_hidden_size"] if mixtures_alone else fields["ffn_hidden_size"])


def activation_name(function: Any) -> str:
    """Ours of an activation, or a hand-edited program's own."""
    names = {id(known): name for name, known in ACTIVATIONS.items()}
    return names.get(id(function), str(getattr(function, "__name__", "of its own")))


def write_model(folder: Path, model: SavedModel) -> None:
    config = {**model.config, "activation_func": activation_name(model.config["activation_func"])}
    write_json(folder / CANONICAL, {"config": config, "embedding": asdict(model.embedding)})


def _special(config: Any) -> dict[str, Any]:
    fields = {name: getattr(config, name, None) for name in SPECIAL}
    if not config.num_moe_experts:
        fields = {name: value for name, value in fields.items() if not name.startswith("moe_")}
    elif isinstance(fields["moe_layer_freq"], int):  # every nth layer, written as the list that it stands for
        every = fields["moe_layer_freq"]
        fields["moe_layer_freq"] = [int(number % every == 0) for number in range(config.num_layers)]
    if fields.get("rope_type") != "yarn":
        fields = {name: value for name, value in fields.items() if name not in _YARN}
    described = {name: value for name, value in fields.items() if value}
    if config.multi_latent_attention:
        described["q_lora_rank"] = config.q_lora_rank  # None is full queries, and not Megatron-Core's default
    return described


def _show(value: object) -> str:
    return activation_name(value) if callable(value) else str(value)
