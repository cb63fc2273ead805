"""How well a model predicts held-out text: at a glance while it is trained, exactly at the end, by window in an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron import loop
from trainwright.runtime.megatron.data import HeldOut, build_heldout
from trainwright.runtime.megatron.model import Model
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.parallel import data_rank
from trainwright.runtime.stages import bigram

BATCHES_IN_MEMORY = 64  # of each data rank
BATCH_TOKENS = 2048  # at least: many tiny batches would spend their time between the kernels


@dataclass(frozen=True)
class HeldOutText:
    """The held-out splits of a tokenize stage, for some of its sources."""

    folder: Path  # the stage's output
    summary: Mapping[str, Any]  # the stage's summary.json
    sources: Sequence[str]

    def windows(self, split: str, sequence_length: int) -> dict[str, HeldOut]:
        """By source, of those that have something to predict in this split."""
        return {
            source: build_heldout(self.folder, split, source, sequence_length=sequence_length)
            for source in self.sources
            if self.summary["tokens"][split][source] > 1
        }

    def validate(self, model: Model, *, sequences: int, micro_batch: int) -> dict[str, float]:
        """`validation/<source>` (nats a token) on `sequences` windows at equal distances: documents differ; and
        `validation_perplexity` over all of them. All ranks call it together."""
        figures, nats_sum, tokens_sum = {}, 0.0, 0
        for source, windows in self.windows("validation", model.embedding.sequence_length).items():
            count = min(sequences, windows.num_windows)
            chosen = [index * windows.num_windows // count for index in range(count)]
            nats, tokens = score(model, windows, chosen, micro_batch)
            figures[f"validation/{source}"] = nats / tokens
            nats_sum, tokens_sum = nats_sum + nats, tokens_sum + tokens
        if tokens_sum:
            figures["validation_perplexity"] = math.exp(nats_sum / tokens_sum)
        return figures

    def check_baseline(self, baseline: str) -> None:
        """Raise DataError where the baseline could not be measured at the end: better before training than after it."""
        tested = [source for source in self.sources if self.summary["tokens"]["test"][source] > 1]
        if baseline == "bigram" and tested and not any(self.summary["tokens"]["validation"][s] > 1 for s in tested):
            raise DataError(
                f"the bigram baseline chooses its weights on validation text, and {', '.join(tested)} have none: "
                "raise data.validation, give more documents, or set baseline: none"
            )

    def test(self, model: Model, *, micro_batch: int, baseline: str) -> dict[str, float]:
        """Every token of the test split but the first of each source's stream; the baseline on the very same tokens.

        `test/loss/<source>` (nats a token), `test/perplexity`, `test/bits_per_byte`; with baseline "bigram" the same of
        it. Empty where the split is. All ranks call it together.
        """
        windows = self.windows("test", model.embedding.sequence_length)
        if not windows:
            return {}
        scores = {source: score(model, held, range(held.num_windows), micro_batch) for source, held in windows.items()}
        nats, tokens = (sum(pair[i] for pair in scores.values()) for i in (0, 1))
        num_bytes = sum(self.summary["bytes"]["test"][source] for source in windows)
        figures = {f"test/loss/{source}": total / count for source, (total, count) in scores.items()}
        figures["test/perplexity"] = math.exp(nats / tokens)
        figures["test/bits_per_byte"] = nats / math.log(2) / num_bytes
        if baseline == "bigram":
            box: list[Any] = [bigram.compare(self.folder, tuple(windows)) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(box, src=0)
            figures |= box[0]
        return figures


def score(model: Model, windows: HeldOut, chosen: Sequence[int], micro_batch: int) -> tuple[float, int]:
    """(nats, tokens) over the chosen windows. All ranks call it together."""
    size = max(micro_batch, BATCH_TOKENS // model.embedding.sequence_length)
    at_once = size * data_rank()[1] * BATCHES_IN_MEMORY
    nats_sum, tokens_sum = 0.0, 0
    for begin in range(0, len(chosen), at_once):
        part = chosen[begin : begin + at_once]
        batches = [_batch(windows, part[first : first + size], size) for first in range(0, len(part), size)]
        nats, tokens = loop.evaluate_nats(model, batches)
        nats_sum, tokens_sum = nats_sum + nats, tokens_sum + tokens
    return nats_sum, tokens_sum


def window_sequences(windows: HeldOut) -> list[Tokens]:
    """The windows as sequences to score: every token but a window's first counts."""
    sequences = []
    for index in range(windows.num_windows):
        row = windows.batch(index, 1)
        count = int(row["loss_mask"].sum())
        tokens = (int(row["tokens"][0, 0]), *row["labels"][0, :count].tolist())
        sequences.append(Tokens(tokens, (0, *[1] * count)))
    return sequences


def _batch(windows: HeldOut, chosen: Sequence[int], size: int) -> loop.Batch:
    """The chosen windows, and masked ones up to `size`: all batches have one shape."""
    rows = [windows.batch(index, 1) for index in (*chosen, *[windows.num_windows] * (size - len(chosen)))]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
