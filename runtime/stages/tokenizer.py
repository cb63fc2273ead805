"""Train a byte-level BPE tokenizer on the train split, with Hugging Face `tokenizers`, or take over that of a model.

Leaves `work/<stage>/output/tokenizer.json`, which `tokenizers` and `transformers` read.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainwright.runtime.errors import DataError
from trainwright.runtime.reading import read_json
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.corpus import END_OF_TEXT, document_file, read_summary, read_texts
from trainwright.runtime.step_folders import HUGGINGFACE, find_weights
from trainwright.runtime.workspace import Progress, StageFolder, open_workspace, write_atomically, write_json

SPECIAL_TOKENS = (END_OF_TEXT, "<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 0 to 3
NUM_BYTES = 256  # every byte is a token, so that any text can be encoded


@stage_verb
def run(*, stage: str, inputs: str, vocab_size: int, initial: str = "") -> None:
    """Train on all sources of stage `inputs`; at most `vocab_size` tokens, special ones and the 256 bytes included. With
    `initial`, a path from the data root, the tokenizer of the model there is taken over as it is.

    Raises DataError when the train split is empty, `vocab_size` leaves no room for the bytes or for that tokenizer's ids, or
    the model has none.
    """
    workspace = open_workspace()
    folder, source_folder = workspace.stage(stage), workspace.stage(inputs)
    counts: dict[str, dict[str, int]] = read_summary(source_folder)["documents"]
    if initial:
        tokenizer, end_of_text = _take_over(workspace.data_root / initial, vocab_size)
        shutil.rmtree(folder.output, ignore_errors=True)
    else:
        tokenizer, end_of_text = _train(folder, source_folder, counts["train"], vocab_size), END_OF_TEXT
    sizes = {
        source: _bytes_and_tokens(tokenizer, read_texts(document_file(source_folder.output, "validation", source)))
        for source in counts["validation"]
    }
    num_bytes, num_tokens = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    ratio = num_bytes / num_tokens if num_tokens else None
    measured = f"{ratio:.2f} bytes a token on validation" if ratio else "no validation text to measure it on"
    print(measured)
    actual = tokenizer.get_vocab_size()
    known = {token: number for token in SPECIAL_TOKENS if (number := tokenizer.token_to_id(token)) is not None}
    summary: dict[str, Any] = {
        "key_figure": f"{actual:,} tokens, {measured}",
        "vocab_size": actual,
        "special_tokens": {**known, END_OF_TEXT: tokenizer.token_to_id(end_of_text)},
        "validation_bytes_per_token": ratio,
    }
    write_atomically(folder.output / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder.summary, summary)


def _train(folder: StageFolder, source_folder: StageFolder, counts: Mapping[str, int], vocab_size: int) -> Tokenizer:
    """On all documents of the train split, counted by source."""
    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < smallest:
        raise DataError(f"a vocabulary of {vocab_size} tokens is too small: special tokens and bytes take {smallest}")
    num_documents = sum(counts.values())
    if not num_documents:
        raise DataError(
            f"the train split of stage {source_folder.path.name!r} is empty: there is nothing to train a tokenizer on"
        )
    shutil.rmtree(folder.output, ignore_errors=True)
    progress = Progress(folder, num_documents, "documents")

    def documents() -> Iterator[str]:
        done = 0
        for source in counts:
            for text in read_texts(document_file(source_folder.output, "train", source)):
                yield text
                done += 1
                progress.update(done)

    tokenizer = train(documents(), vocab_size)
    actual = tokenizer.get_vocab_size()
    print(f"trained byte-level BPE on {num_documents:,} documents: {actual:,} tokens")
    if actual < vocab_size:
        print(
            f"warning: the text has pairs for {actual:,} of {vocab_size:,} tokens; ids from {actual:,} on stay unused"
        )
    return tokenizer


def _take_over(given: Path, vocab_size: int) -> tuple[Tokenizer, str]:
    """(the tokenizer of the model in a folder, its token for the end of a text)."""
    model = find_weights(given)
    path = model / "tokenizer.json"
    if not path.exists():
        raise DataError(
            f"the initial model {model} has no tokenizer.json, so nobody knows what its token ids mean: copy there the one that "
            "it was trained with"
        )
    tokenizer = Tokenizer.from_file(str(path))
    needed = 1 + max(tokenizer.get_vocab().values())
    if needed > vocab_size:
        raise DataError(
            f"the initial model's tokenizer {path} has ids up to {needed - 1:,}, and the model's vocab_size is {vocab_size:,}: "
            "set model.vocab_size to that of the initial model"
        )
    end_of_text: str | None = END_OF_TEXT
    if tokenizer.token_to_id(END_OF_TEXT) is None:  # the model's own, which its config names by its id
        ids = read_json(model / HUGGINGFACE).get("eos_token_id")
        end_of_text = tokenizer.id_to_token(ids[0] if isinstance(ids, list) else ids) if ids is not None else None
    if end_of_text is None:
        raise DataError(
            f"{path} has no token {END_OF_TEXT}, and no {HUGGINGFACE} beside it names another by eos_token_id: no id ends a text"
        )
    print(f"took over the tokenizer of {model}: {tokenizer.get_vocab_size():,} tokens, a text ends with {end_of_text}")
    return tokenizer, end_of_text


def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with GPT-2's word boundaries. Equal texts in equal order give equal merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _bytes_and_tokens(tokenizer: Tokenizer, texts: Iterator[str]) -> tuple[int, int]:
    num_bytes = num_tokens = 0
    for text in texts:
        num_bytes += len(text.encode())
        num_tokens += len(tokenizer.encode(text, add_special_tokens=False).ids)
    return num_bytes, num_tokens
