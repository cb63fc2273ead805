"""Encode the documents of every split and source into Megatron's `.bin` and `.idx` files.

Leaves `work/<stage>/output/{train,validation,test}/<source>.{bin,idx}`: each document's tokens, then end-of-text. A split
without documents of a source has no files, and 0 in the summary.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron.data import TokenFile, index_cache, token_dtype
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.corpus import END_OF_TEXT, SPLITS, document_file, read_summary, read_texts
from trainwright.runtime.stages.token_files import tokenizer_id
from trainwright.runtime.workspace import Progress, open_workspace, write_json

BATCH_CHARACTERS = 4_000_000  # enough for every thread of the encoder, little enough to hold


@stage_verb
def run(*, stage: str, inputs: str, tokenizer: str) -> None:
    """Encode what stage `inputs` ingested with the tokenizer that stage `tokenizer` left.

    Raises DataError when the train split is empty.
    """
    workspace = open_workspace()
    folder, source_folder, tokenizer_folder = (workspace.stage(name) for name in (stage, inputs, tokenizer))
    counts: dict[str, dict[str, int]] = read_summary(source_folder)["documents"]
    trained = read_summary(tokenizer_folder)
    if not sum(counts["train"].values()):
        raise DataError(f"the train split of stage {inputs!r} is empty: there is nothing to train on")
    tokenizer_file = tokenizer_folder.output / "tokenizer.json"
    encoder, end_of_text = load_encoder(tokenizer_file), trained["special_tokens"][END_OF_TEXT]
    for path in (folder.output, index_cache(folder.output)):
        shutil.rmtree(path, ignore_errors=True)

    progress = Progress(folder, sum(sum(by_source.values()) for by_source in counts.values()), "documents")
    tokens: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    size: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    done = 0
    for split in SPLITS:
        (folder.output / split).mkdir(parents=True)
        for source, num_documents in counts[split].items():
            tokens[split][source] = size[split][source] = 0
            if num_documents:
                texts = read_texts(document_file(source_folder.output, split, source))
                writer = TokenFile(folder.output / split / source, encoder.get_vocab_size())
                for batch in _batches(texts):
                    for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
                        writer.add_document([*encoding.ids, end_of_text])
                    size[split][source] += sum(len(text.encode()) for text in batch)
                    done += len(batch)
                    progress.update(done)
                writer.finish()
                tokens[split][source] = writer.num_tokens
            print(f"{split:<10} {source}: {num_documents:,} documents, {tokens[split][source]:,} tokens")

    num_train = sum(tokens["train"].values())
    ratio = sum(size["train"].values()) / num_train
    summary: dict[str, Any] = {
        "key_figure": f"{num_train:,} training tokens, {ratio:.2f} bytes a token",
        "tokens": tokens,
        "bytes": size,
        "documents": counts,
        "end_of_text": end_of_text,
        "vocab_size": encoder.get_vocab_size(),
        "tokenizer": tokenizer_id(tokenizer_file),
        "token_dtype": token_dtype(encoder.get_vocab_size()).__name__,
    }
    write_json(folder.summary, summary)


def load_encoder(path: Path) -> Tokenizer:
    """The tokenizer, so set that a document which spells out a special token gets its characters, not the token."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
