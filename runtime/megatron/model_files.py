"""What makes a checkpoint self-contained: files beside its weights that say which model they are, and how it is spoken to.

model.json            the literals that define the model, and its Embedding; not the layout, not the training
tokenizer.json        what its token ids mean
split.json            which groups of documents it has not seen (where its data were split by the pipeline)
chat_template.jinja   how a conversation becomes text (once it was tuned on conversations)
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.model import Embedding, Model
from trainwright.runtime.workspace import write_atomically, write_json

MODEL, TOKENIZER, SPLIT, CHAT_TEMPLATE = "model.json", "tokenizer.json", "split.json", "chat_template.jinja"
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


@dataclass(frozen=True)
class ModelFiles:
    """What goes along with the weights."""

    tokenizer: Path
    split: Path | None  # None: the model's data were not split by the pipeline
    chat_template: str  # a Jinja template; "" before a tuning on conversations


@dataclass(frozen=True)
class SavedModel:
    """The model that a checkpoint holds: `TransformerConfig(**config)` with any layout and precision added."""

    config: dict[str, Any]
    embedding: Embedding


def write_model_files(folder: Path, model: Model, files: ModelFiles) -> None:
    """Write them into a step folder. Raises CheckpointError where one that should go along is not there."""
    write_json(folder / MODEL, _describe(model))
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
    path = folder / MODEL
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        config = dict(saved["config"])
        config["activation_func"] = getattr(torch.nn.functional, config["activation_func"])
        return SavedModel(config, Embedding(**saved["embedding"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not describe a model ({error}): it is written with every checkpoint"
        ) from error


def check_same_model(model: Model, folder: Path) -> None:
    """Raise CheckpointError, with each field that differs, where a step folder holds another model than this one."""
    saved = read_model(folder)
    there = {**saved.config, **asdict(saved.embedding)}
    here = {name: getattr(model.config, name) for name in DEFINING} | asdict(model.embedding)
    if model.embedding.positions == "rope":  # any length can be asked of such a model
        del here["sequence_length"]
    differences = [
        f"{name}: {_show(there.get(name))} there, {_show(value)} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differences:
        raise CheckpointError(
            f"{folder} is of another model: {'; '.join(differences)}. Write the values that it was trained with, or start "
            "from a checkpoint of this model"
        )


def _describe(model: Model) -> dict[str, Any]:
    config = {name: getattr(model.config, name) for name in DEFINING}
    return {
        "config": {**config, "activation_func": config["activation_func"].__name__},
        "embedding": asdict(model.embedding),
    }


def _show(value: object) -> str:
    return str(getattr(value, "__name__", value))
