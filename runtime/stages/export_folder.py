"""The files of a Hugging Face model folder: weights, configs, tokenizer, and a card that says what lies there."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.runtime.megatron.huggingface import BUFFERS
from trainwright.runtime.megatron.weight_files import SHARD_BYTES, WeightWriter
from trainwright.runtime.step_folders import HUGGINGFACE
from trainwright.runtime.workspace import write_atomically, write_json


@dataclass(frozen=True)
class Special:
    """One special token."""

    id: int
    text: str


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of the exported model, and what its special tokens are for."""

    tokenizer: Path  # tokenizer.json
    chat_template: str  # Jinja; "": the model was not tuned on conversations
    end_of_text: Special
    pad: Special
    end_of_turn: Special | None  # None: without a chat template

    @property
    def end(self) -> Special:
        """Where an answer (a text, without a chat template) ends."""
        return self.end_of_turn or self.end_of_text

    @property
    def end_ids(self) -> list[int]:
        """All ids that end a generation: a tuned model may still end a whole text."""
        return list(dict.fromkeys((self.end.id, self.end_of_text.id)))


def write_weights(
    folder: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write named tensors as `dtype`, in one file or in several with an index. Returns the number of parameters."""
    writer, parameters = WeightWriter(folder, shard_bytes), 0
    for name, tensor in weights:
        buffer = name.endswith(BUFFERS)
        writer.add(name, tensor.float() if buffer else tensor.to(dtype))
        parameters += 0 if buffer else tensor.numel()
    writer.close()
    return parameters


def write_configs(folder: Path, model_config: dict[str, Any], vocabulary: Vocabulary, context_length: int) -> None:
    """config.json, generation_config.json, tokenizer.json and tokenizer_config.json."""
    ids = {"bos_token_id": vocabulary.end_of_text.id, "pad_token_id": vocabulary.pad.id}
    write_json(folder / HUGGINGFACE, {**model_config, **ids, "eos_token_id": vocabulary.end.id})
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": vocabulary.end_ids})
    shutil.copyfile(vocabulary.tokenizer, folder / "tokenizer.json")
    tokenizer: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": vocabulary.end_of_text.text,  # each text of the pretraining follows one
        "eos_token": vocabulary.end.text,
        "pad_token": vocabulary.pad.text,
    }
    if vocabulary.chat_template:
        tokenizer["chat_template"] = vocabulary.chat_template
    write_json(folder / "tokenizer_config.json", tokenizer)


def write_card(folder: Path, *, name: str, facts: Mapping[str, object], tuned: bool) -> None:
    """README.md, as Hugging Face's hub shows it: what the model is and how it is loaded."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    if tuned:
        use = """messages = [{"role": "user", "content": "..."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
    else:
        use = 'inputs = tokenizer("...", return_tensors="pt")'
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

|  |  |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
{use}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""
    write_atomically(folder / "README.md", text)
