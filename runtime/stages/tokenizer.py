"""Train a byte-level BPE tokenizer on the train split, with Hugging Face `tokenizers`.

Leaves `work/<stage>/output/tokenizer.json`, which `tokenizers` and `transformers` read.
"""

import shutil
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.corpus import END_OF_TEXT, document_file, read_summary, read_texts
from trainwright.runtime.workspace import Progress, open_workspace, write_atomically, write_json

SPECIAL_TOKENS = (END_OF_TEXT, "<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 0 to 3
NUM_BYTES = 256  # every byte is a token, so that any text can be encoded


@stage_verb
def run(*, stage: str, inputs: str, vocab_size: int) -> None:
    """Train on all sources of stage `inputs`; at most `vocab_size` tokens, special ones and the 256 bytes included.

    Raises DataError when the train split is empty or `vocab_size` leaves no room for the bytes.
    """
    smallest = len(SPECIAL_TOKENS) + NUM_BYTES
    if vocab_size < smallest:
        raise DataError(f"a vocabulary of {vocab_size} tokens is too small: special tokens and bytes take {smallest}")
    workspace = open_workspace()
    folder, source_folder = workspace.stage(stage), workspace.stage(inputs)
    counts: dict[str, dict[str, int]] = read_summary(source_folder)["documents"]
    num_documents = sum(counts["train"].values())
    if not num_documents:
        raise DataError(f"the train split of stage {inputs!r} is empty: there is nothing to train a tokenizer on")
    shutil.rmtree(folder.output, ignore_errors=True)

    progress = Progress(folder, num_documents, "documents")

    def documents() -> Iterator[str]:
        done = 0
        for source in counts["train"]:
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

    sizes = {
        source: _bytes_and_tokens(tokenizer, read_texts(document_file(source_folder.output, "validation", source)))
        for source in counts["validation"]
    }
    num_bytes, num_tokens = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    ratio = num_bytes / num_tokens if num_tokens else None
    measured = f"{ratio:.2f} bytes a token on validation" if ratio else "no validation text to measure it on"
    print(measured)
    summary: dict[str, Any] = {
        "key_figure": f"{actual:,} tokens, {measured}",
        "vocab_size": actual,
        "special_tokens": {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS},
        "validation_bytes_per_token": ratio,
    }
    write_atomically(folder.output / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder.summary, summary)


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
