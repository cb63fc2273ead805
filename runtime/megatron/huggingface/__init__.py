"""A model's config and weights as Hugging Face's `transformers` has them, both ways: a module a kind of format."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from trainwright.runtime.errors import CheckpointError, Unsupported
from trainwright.runtime.megatron.huggingface.decoders import DECODERS
from trainwright.runtime.megatron.huggingface.deepseek import DEEPSEEK
from trainwright.runtime.megatron.huggingface.formats import Format, Json, distance
from trainwright.runtime.megatron.huggingface.gpt2 import GPT2
from trainwright.runtime.megatron.model_files import (
    CHAT_TEMPLATE,
    TOKENIZER,
    SavedModel,
    ffn_of_dense_layers,
    write_model,
)
from trainwright.runtime.megatron.weight_files import WeightReader, WeightWriter
from trainwright.runtime.step_folders import HUGGINGFACE
from trainwright.runtime.workspace import write_atomically

FORMATS: tuple[Format, ...] = (*DECODERS, DEEPSEEK, GPT2)
OUTPUT = "output_layer.weight"
BUFFERS = ("e_score_correction_bias",)  # no parameters: they stay in fp32 whatever the others are in
# Buffers that older versions of transformers saved: they follow from the config.
_FOLLOWS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


def format_of(model: SavedModel) -> Format:
    """The format that has a place for all of a model. Raises Unsupported, with what the nearest one lacks."""
    foreign = {format: [*format.foreign(model), *_foreign_to_all(model)] for format in FORMATS}
    nearest = min(foreign, key=lambda format: distance(foreign[format]))
    if foreign[nearest]:
        raise Unsupported(
            f"the model has {', '.join(foreign[nearest])}: Hugging Face's {nearest.name} format, the nearest of those that are "
            f"written ({_names()}), has no place for that; train a model of one of these kinds to export it"
        )
    return nearest


def named_weights(read: Callable[[str], Tensor], format: Format, model: SavedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in Hugging Face's state dict, tensor) of a whole model's weights. `read` gives those of a canonical checkpoint.

    Rows of the vocabulary's padding and a tied output layer are left out. What multiplies the logits (muP) is part of the output
    layer there.
    """
    for rule in format.rules(model):
        tensor = read(rule.ours)
        if rule.ours == OUTPUT and model.embedding.output_multiplier != 1.0:
            tensor = tensor * model.embedding.output_multiplier
        yield from zip(rule.theirs, rule.export(tensor), strict=True)


def _foreign_to_all(model: SavedModel) -> list[str]:
    if model.embedding.tied and model.embedding.output_multiplier != 1.0:
        return [f"logits x {model.embedding.output_multiplier:g} (muP) with an output layer that is the embedding"]
    return []


def read_folder(folder: Path) -> tuple[Format, SavedModel]:
    """The format and the model of a Hugging Face folder, by its config.json. Raises CheckpointError where that is damaged,
    Unsupported where the model is of another kind."""
    try:
        config: Json = json.loads((folder / HUGGINGFACE).read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / HUGGINGFACE} is no config of a model ({error!r}): copy the folder anew"
        ) from error
    for format in FORMATS:
        if format.model_type == kind:
            try:
                model = format.model(config)
                fields = model.config | {"ffn_hidden_size": ffn_of_dense_layers(model.config)}
                return format, SavedModel(fields, model.embedding)
            except KeyError as error:
                raise CheckpointError(f"{folder / HUGGINGFACE} does not say {error}: copy the folder anew") from error
    raise Unsupported(f"{folder} holds a model of the type {kind}, and those that are read are {_names()}")


def import_folder(folder: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Make a canonical checkpoint of a Hugging Face folder, tensor by tensor, each as it is. It needs no processes and no
    model. `progress` is told (tensors done, of how many). `target` gets its name when it is whole.

    Raises CheckpointError where the weights are not those that config.json speaks of, Unsupported as `read_folder` does.
    """
    format, model = read_folder(folder)
    reader = WeightReader(folder)
    rules = list(format.rules(model))
    places = _places(reader, rules_names := [name for rule in rules for name in rule.theirs], format)
    if unknown := [name for name in reader.shapes if name not in places.values() and not _FOLLOWS.search(name)]:
        tied = [name for name in unknown if model.embedding.tied and name == "lm_head.weight"]
        if unknown != tied:
            raise CheckpointError(
                f"{folder} holds {_some(unknown)} beside the {len(rules_names):,} tensors of a {format.name} model of this "
                "config.json: it is of another model"
            )
    scratch = target.with_name(f"{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    writer = WeightWriter(scratch)
    for number, rule in enumerate(rules, start=1):
        writer.add(rule.ours, rule.adopt([reader.read(places[name]) for name in rule.theirs]))
        progress(number, len(rules))
    writer.close()
    _copy_tokenizer(folder, scratch)
    write_model(scratch, model)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)


def _places(reader: WeightReader, names: list[str], format: Format) -> dict[str, str]:
    """Under which name each tensor lies there: checkpoints of the bare model lack the format's prefix."""
    bare = not any(name.startswith(format.prefix) for name in reader.shapes)
    places = {name: name.removeprefix(format.prefix) if bare else name for name in names}
    if missing := [name for name, place in places.items() if place not in reader]:
        raise CheckpointError(
            f"{reader.folder} lacks {_some(missing)} of the {len(names):,} tensors that a {format.name} model of its config.json "
            "has: copy it anew"
        )
    return places


def _copy_tokenizer(folder: Path, target: Path) -> None:
    if (folder / TOKENIZER).exists():
        shutil.copyfile(folder / TOKENIZER, target / TOKENIZER)
    if (folder / CHAT_TEMPLATE).exists():
        shutil.copyfile(folder / CHAT_TEMPLATE, target / CHAT_TEMPLATE)
    elif (folder / "tokenizer_config.json").exists():
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            write_atomically(target / CHAT_TEMPLATE, template)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _names() -> str:
    return ", ".join(format.name for format in FORMATS)
