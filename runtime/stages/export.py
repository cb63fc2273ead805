"""Export a trained model as a folder that Hugging Face `transformers` loads, and prove that it is the same model.

Leaves `work/<stage>/output/model/`: weights (in the precision of the training; without the vocabulary's padding), configs,
tokenizer, chat template, and a card. The folder is written aside, loaded with `transformers` and compared with the trained
model, logits and token ids, before it gets its name.
"""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron import huggingface, loop
from trainwright.runtime.megatron.checkpoint import ModelFiles, files_of, find_model, load_weights
from trainwright.runtime.megatron.model import Embedding, Model, build_frozen
from trainwright.runtime.megatron.model_files import describe
from trainwright.runtime.megatron.parallel import Parallel, check_model, start
from trainwright.runtime.megatron.pieces import pieces
from trainwright.runtime.megatron.platform import Literals, install
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.chat import PAD, ChatTokenizer
from trainwright.runtime.stages.corpus import END_OF_TEXT
from trainwright.runtime.stages.export_check import CONVERSATION, TEXT, Passage, check_logits, check_tokens
from trainwright.runtime.stages.export_folder import Special, Vocabulary, write_card, write_configs, write_weights
from trainwright.runtime.stages.records import Message
from trainwright.runtime.workspace import open_workspace, write_json

__all__ = ["Embedding", "run"]

install()  # before the program builds its configs

ONE_PROCESS = Parallel(tensor=1, pipeline=1, data=1)


@stage_verb
def run(*, stage: str, initial: str, model: Any, embedding: Embedding, layer_spec: str, tolerance: float) -> None:
    """Export the newest checkpoint of `initial` (a stage, or a path), whatever layout saved it. `model` is Megatron-Core's own.

    `tolerance`: largest absolute difference of logits, in fp32 from the exported weights. Raises Unsupported (a model that the
    format has no place for), CheckpointError, ExportMismatch.
    """
    workspace = open_workspace()
    folder = workspace.stage(stage)
    saved = describe(model, embedding)
    format = huggingface.format_of(saved)
    checkpoint = find_model(workspace, initial)
    files = files_of(checkpoint)
    chat = ChatTokenizer(files.tokenizer, files.chat_template) if files.chat_template else None
    vocabulary = _vocabulary(chat, files)
    built = _open(model, embedding, layer_spec, checkpoint)

    shutil.rmtree(folder.output, ignore_errors=True)
    scratch = folder.path / "unchecked"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    dtype = model.params_dtype
    config = {
        "architectures": [format.architecture],
        "model_type": format.model_type,
        "initializer_range": model.init_method_std,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **format.config(saved),
    }
    held = {piece.name: piece.tensor.detach() for piece in pieces(built)}
    weights = huggingface.named_weights(held.__getitem__, format, saved)
    parameters = write_weights(scratch, weights, dtype)
    write_configs(scratch, config, vocabulary, embedding.sequence_length)
    facts = {
        "architecture": config["architectures"][0],
        "parameters": parameters,
        "dtype": config["torch_dtype"],
        "context_length": embedding.sequence_length,
        "vocab_size": embedding.vocab_size,
        "checkpoint": f"{initial.rstrip('/')}, {checkpoint.name}",
        "chat_template": bool(files.chat_template),
    }
    write_card(scratch, name=Path(initial).name, facts=facts, tuned=bool(files.chat_template))

    passages, device = _read(built, chat, vocabulary, scratch), built.platform.device
    del built, held, weights  # both models need not be in memory at once
    gc.collect()
    worst = check_logits(scratch, passages, tolerance, device)
    compared = sum(len(passage.tokens) for passage in passages)
    print(f"logits over {compared:,} tokens differ by {worst:.2g} at most (tolerance {tolerance:g})")
    folder.output.mkdir(parents=True)
    os.replace(scratch, folder.output / "model")
    summary = {
        **facts,
        "files": {path.name: path.stat().st_size for path in sorted((folder.output / "model").iterdir())},
        "compared_tokens": compared,
        "largest_logit_difference": worst,
        "key_figure": f"{parameters / 1e6:,.1f}M parameters, logits differ by {worst:.2g} at most",
    }
    write_json(folder.summary, summary)


def _open(written: Any, embedding: Embedding, layer_spec: str, checkpoint: Path) -> Model:
    """The whole model in this process, with the checkpoint's weights, computing in fp32 whatever they were trained in."""
    platform = start(ONE_PROCESS, seed=0)
    literals, overrides = platform.adapt(Literals(written, None, None, layer_spec))
    print(platform.describe(overrides))
    config = literals.model
    check_model(
        ONE_PROCESS, config, sequence_length=embedding.sequence_length, padded_vocab_size=embedding.padded_vocab_size
    )
    config.bf16 = config.fp16 = False
    config.params_dtype = config.pipeline_dtype = torch.float32
    built = build_frozen(literals, embedding, platform)
    load_weights(built, checkpoint)
    print(f"loaded {checkpoint}")
    return built


def _vocabulary(chat: ChatTokenizer | None, files: ModelFiles) -> Vocabulary:
    """`chat`: of a model with a chat template. Another's tokenizer, which may be that of a model that it began with, needs but
    an end of text, and pads with it where it has nothing else."""
    tokenizer = Tokenizer.from_file(str(files.tokenizer))

    def special(token: int) -> Special:
        return Special(token, str(tokenizer.id_to_token(token)))

    if chat:
        ends = special(chat.end_of_text), special(chat.pad), special(chat.end_of_turn)
        return Vocabulary(files.tokenizer, files.chat_template, *ends)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
        raise DataError(f"{files.tokenizer} has no token {END_OF_TEXT}, which ends the texts of an exported model")
    pad = tokenizer.token_to_id(PAD)
    return Vocabulary(
        files.tokenizer, "", special(end_of_text), special(end_of_text if pad is None else pad), end_of_turn=None
    )


def _read(built: Model, chat: ChatTokenizer | None, vocabulary: Vocabulary, folder: Path) -> list[Passage]:
    """What the trained model says of a text, and of a conversation where it has a template. The exported tokenizer must
    read both alike."""
    text = Tokenizer.from_file(str(vocabulary.tokenizer)).encode(TEXT, add_special_tokens=False).ids
    texts = {"the text": text}
    conversation = None
    if chat:
        messages = [Message(role, content) for role, content in CONVERSATION]
        whole, _ = chat.encode(messages)
        conversation = (whole, chat.prompt(messages[:-1]))
        texts["the conversation"] = list(whole)
    check_tokens(folder, text=text, conversation=conversation)
    length = built.embedding.sequence_length
    return [
        Passage(name, first, piece := tuple(tokens[first : first + length]), _logits(built, piece))
        for name, tokens in texts.items()
        for first in range(0, len(tokens), length)
    ]


def _logits(built: Model, tokens: tuple[int, ...]) -> torch.Tensor:
    logits = loop.forward_logits(built, torch.tensor(tokens, dtype=torch.int64))
    return logits[:, : built.embedding.vocab_size].cpu()
