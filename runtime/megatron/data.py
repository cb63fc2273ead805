"""Token files through megatron-core's own classes: written by `tokenize`, read in training and evaluation.

`folder` is everywhere the output folder of a `tokenize` stage: `{train,validation,test}/<source>.{bin,idx}` and
`summary.json`.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset, helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split, normalize
from torch import Tensor

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron.batches import Batches
from trainwright.runtime.workspace import write_json

ORDER = 2  # of how sequences are ordered: another one gets indices of its own
Array = np.ndarray[Any, Any]
Batch = dict[str, Tensor]  # tokens, labels, position_ids: int64, loss_mask: float32; each [sequences, sequence_length]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Two bytes a token where ids fit, else four."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.int32


def index_cache(folder: Path) -> Path:
    """Where Megatron's sample indices lie: beside `folder`, because they are no result and hold the paths of a machine."""
    return folder.parent / "index"


class TokenFile:
    """Writes one `<prefix>.bin` and `.idx`, a document at a time."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix, self._dtype, self.num_tokens = prefix, token_dtype(vocab_size), 0
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._dtype)

    def add_document(self, tokens: Sequence[int]) -> None:
        """Append a document of token ids, its end-of-text included."""
        self._builder.add_document(np.array(tokens, dtype=self._dtype), [len(tokens)])
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Write the index; without it the file is not readable."""
        self._builder.finalize(f"{self._prefix}.idx")


@dataclass(frozen=True)
class _Vocabulary:
    """What Megatron's datasets ask of a tokenizer. It has no `pad`: nothing in a token file is padding."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class TrainingStream:
    """The sequences of a whole training run, in an order that depends on the seed and not on the layout."""

    def __init__(self, dataset: GPTDataset | BlendedDataset, batches: Batches) -> None:
        self._dataset, self._batches = dataset, batches

    def batch(self, step: int, micro_batch: int, data_rank: int, data_size: int) -> list[Batch]:
        """The micro-batches of data-parallel rank `data_rank` of `data_size` in step `step` (from 0).

        The step's batch must be a multiple of `micro_batch * data_size`. All ranks together hold the same sequences
        whatever the layout; micro-batch i of all ranks together is a contiguous part of the global batch.
        """
        across = micro_batch * data_size
        first = self._batches.before(step) + data_rank * micro_batch
        return [
            self._stack(range(first + offset, first + offset + micro_batch))
            for offset in range(0, self._batches.size(step), across)
        ]

    def _stack(self, indices: range) -> Batch:
        samples = [self._dataset[index] for index in indices]
        return {
            key: torch.stack([sample[key] for sample in samples])
            for key in ("tokens", "labels", "loss_mask", "position_ids")
        }


def build_training_stream(
    folder: Path,
    sources: Sequence[str],
    weights: Sequence[float] | None,
    *,
    steps: int,
    sequence_length: int,
    batches: Batches,
    seed: int,
) -> TrainingStream:
    """The training sequences of `steps` steps: Megatron's GPTDataset a source, blended by `weights`.

    `weights` are shares of sequences; None takes each source in proportion to its tokens. A source that is used up starts
    anew, in another order: nothing of it is read a third time before all of it was read twice. Every rank calls this, with
    torch.distributed initialised (a world of one will do): rank 0 builds the indices, in `index_cache(folder)`, and the
    others read them.
    Raises DataError when a source holds less than one sequence.
    """
    prefixes = [_prefix(folder, "train", source) for source in sources]
    files = [IndexedDataset(prefix) for prefix in prefixes]
    num_tokens = [int(file.sequence_lengths.sum()) for file in files]
    for source, count in zip(sources, num_tokens, strict=True):
        check_length(source, count, sequence_length)
    shares = [float(value) for value in (num_tokens if weights is None else weights)]
    shares = [share / sum(shares) for share in shares]
    num_samples = batches.before(steps)
    request = [ORDER, [str(prefix) for prefix in prefixes], num_tokens, shares, num_samples, sequence_length, seed]
    cache = index_cache(folder) / hashlib.sha256(json.dumps(request).encode()).hexdigest()[:16]
    samples = _samples_by_source(cache, shares, num_samples)

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[(prefixes, shares), None, None],
        path_to_cache=str(cache),
        tokenizer=_read_vocabulary(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    with _epoch_after_epoch():
        datasets = [
            _build(GPTDataset, file, prefix, np.arange(len(file), dtype=np.int32), count, Split.train, config)
            for file, prefix, count in zip(files, prefixes, samples, strict=True)
        ]
    whole = datasets[0] if len(datasets) == 1 else _build(BlendedDataset, datasets, shares, num_samples, config)
    if torch.distributed.get_rank() == 0:
        write_json(cache / "complete.json", request)
    return TrainingStream(whole, batches)


def check_length(source: str, num_tokens: int, sequence_length: int) -> None:
    """Raise DataError where the training tokens of a source are not one sequence."""
    if num_tokens < sequence_length + 1:
        raise DataError(
            f"source {source!r} has {num_tokens} training tokens; one sequence takes {sequence_length} + 1 = "
            f"{sequence_length + 1}. Give it more text, or set a shorter model.context_length"
        )


def _build(kind: type, *arguments: Any) -> Any:
    """`kind(*arguments)` on rank 0 first, then, from its cache, on the others."""
    return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, lambda: True, True, *arguments)


@contextlib.contextmanager
def _epoch_after_epoch() -> Iterator[None]:
    """While it lasts, GPTDataset shuffles each epoch of a source by itself. Megatron-Core 0.16.1 shuffles all epochs but perhaps
    the last together: of three, the first third of the run would read a third of the documents not at all, others twice."""
    originals = gpt_dataset._build_document_index, gpt_dataset._build_shuffle_index
    epochs = 1

    def documents_in_order(documents: Array, num_epochs: int, random: Any, separate_final_epoch: bool) -> Array:
        nonlocal epochs
        epochs = num_epochs
        return np.concatenate([random.permutation(documents) for _ in range(num_epochs)]).astype(np.int32)

    def samples_in_order(num_samples: int, total_size: int, random: Any) -> Array:
        parts = np.array_split(
            np.arange(total_size, dtype=np.int64), epochs
        )  # a sample may begin in one and end in the next
        return np.concatenate([random.permutation(part) for part in parts])

    gpt_dataset._build_document_index, gpt_dataset._build_shuffle_index = documents_in_order, samples_in_order
    try:
        yield
    finally:
        gpt_dataset._build_document_index, gpt_dataset._build_shuffle_index = originals


def _samples_by_source(cache: Path, shares: Sequence[float], num_samples: int) -> list[int]:
    """How many of `num_samples` sequences the blend takes from each source, exactly; counted by rank 0.

    Megatron's own builder rounds each share up, adds 0.5 %, and blends as many sequences as the rounded shares sum to:
    with several small sources, that takes more of some than was built, and it stops with an IndexError.
    """
    counts = cache / "samples.json"
    if torch.distributed.get_rank() == 0 and not (cache / "complete.json").exists():
        shutil.rmtree(cache, ignore_errors=True)  # whoever wrote it was killed: an array in it may be cut short
        chosen, within = np.zeros(num_samples, dtype=np.int16), np.zeros(num_samples, dtype=np.int64)
        # BlendedDataset normalises once more, which moves the last bit of a share, and with it ties
        weights = np.array(normalize(list(shares)), dtype=np.float64).tolist()
        helpers.build_blending_indices(chosen, within, weights, len(shares), num_samples, False)
        write_json(counts, np.bincount(chosen, minlength=len(shares)).tolist())
    torch.distributed.barrier()
    samples: list[int] = json.loads(counts.read_text())
    return samples


class HeldOut:
    """The token stream of one source and split, cut into windows so that every token but the first is predicted once.

    A window starts with the last token that the one before it predicted; no context is carried over. `num_tokens` counts
    the predictions: the tokens of the stream less one.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], sequence_length: int, end_of_text: int) -> None:
        self._tokens, self._length, self._filler = tokens, sequence_length, end_of_text
        self.num_tokens = len(tokens) - 1
        self.num_windows = -(-self.num_tokens // sequence_length)

    def batch(self, start: int, count: int) -> Batch:
        """Windows `start` to `start + count`; what lies past the end of the stream has loss_mask 0."""
        rows = np.full((count, self._length + 1), self._filler, dtype=np.int64)
        mask = np.zeros((count, self._length), dtype=np.float32)
        for row in range(count):
            begin = (start + row) * self._length
            window = self._tokens[begin : begin + self._length + 1]
            rows[row, : len(window)] = window
            mask[row, : max(0, len(window) - 1)] = 1.0
        return {
            "tokens": torch.from_numpy(rows[:, :-1].copy()),
            "labels": torch.from_numpy(rows[:, 1:].copy()),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.arange(self._length).repeat(count, 1),
        }


def build_heldout(folder: Path, split: str, source: str, *, sequence_length: int) -> HeldOut:
    """The windows over one source of split "validation" or "test". Raises DataError when there is nothing to predict."""
    prefix = _prefix(folder, split, source)
    dtype = IndexedDataset(prefix).index.dtype
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    if len(tokens) < 2:
        raise DataError(f"source {source!r} has {len(tokens)} token in {split}: one to predict takes two")
    return HeldOut(tokens, sequence_length, _read_vocabulary(folder).eod)


def _prefix(folder: Path, split: str, source: str) -> str:
    prefix = folder / split / source
    if not prefix.with_name(f"{source}.idx").exists():
        raise DataError(
            f"source {source!r} has no tokens in {split} ({prefix}.idx is not there): it is too small for the split to "
            "give it some; give it more text, or leave it out"
        )
    return str(prefix)


def _read_vocabulary(folder: Path) -> _Vocabulary:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return _Vocabulary(vocab_size=summary["vocab_size"], eod=summary["end_of_text"])
