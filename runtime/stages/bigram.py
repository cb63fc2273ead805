"""An interpolated bigram language model over token ids: what a pretrained model has to beat.

P(b | a) = w2 count(a b) / count(a .) + w1 count(b) / N + w0 / V, the classic of Jelinek and Mercer (1980): counts from
the train split, weights by expectation maximisation on validation. After a token that training never has in front of
another, the unigram stands in for the bigram. numpy and scipy only.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from trainwright.runtime.errors import DataError

Array = np.ndarray[Any, Any]
CHUNK_TOKENS = 8_000_000  # counted at a time: bounds memory to some 200 MB however long the stream is
TOLERANCE_NATS = 1e-7  # a token; EM stops when an iteration gains less


@dataclass(frozen=True)
class Bigram:
    """Counts of a training text and the three weights (bigram, unigram, uniform; they add up to 1)."""

    pairs: Any  # scipy.sparse.csr_array [vocab_size, vocab_size]: how often b follows a
    followed: Array  # [vocab_size] how often a token has a successor
    unigram: Array  # [vocab_size] probability
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)

    def components(self, before: Array, after: Array) -> Array:
        """Bigram, unigram and uniform probability of tokens `after` that follow `before`: [3, predictions]."""
        unigram = self.unigram[after]
        seen = self.followed[before]
        pairs = np.asarray(self.pairs[before, after]).reshape(-1)
        bigram = np.where(seen > 0, pairs / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(after), 1 / len(self.unigram))])

    def loss(self, before: Array, after: Array) -> float:
        """Nats, summed over the predictions."""
        return -float(np.log(np.asarray(self.weights) @ self.components(before, after)).sum())


def count(streams: Iterable[Array], vocab_size: int) -> Bigram:
    """Counts over token streams, each by itself: the last token of one is not followed by the first of the next."""
    pairs = sparse.csr_array((vocab_size, vocab_size), dtype=np.int64)
    tokens = np.zeros(vocab_size, dtype=np.int64)
    for stream in streams:
        tokens += np.bincount(stream[:1], minlength=vocab_size)
        for before, after in _chunks(stream):
            ones = np.ones(len(before), dtype=np.int64)
            pairs = pairs + sparse.coo_array((ones, (before, after)), shape=pairs.shape).tocsr()
            tokens += np.bincount(after, minlength=vocab_size)
    return Bigram(pairs=pairs, followed=np.asarray(pairs.sum(axis=1)).reshape(-1), unigram=tokens / tokens.sum())


def fit_weights(model: Bigram, streams: Iterable[Array]) -> Bigram:
    """`model` with the weights that make `streams` most likely (a concave problem: EM finds the one maximum)."""
    heldout = count(streams, len(model.unigram)).pairs.tocoo()
    components = model.components(heldout.row, heldout.col)
    share = heldout.data / heldout.data.sum()
    weights = np.asarray(model.weights)
    previous = -math.inf
    while True:
        joint = weights[:, None] * components
        total = joint.sum(axis=0)
        likelihood = float(share @ np.log(total))
        if likelihood - previous < TOLERANCE_NATS:
            return replace(model, weights=(float(weights[0]), float(weights[1]), float(weights[2])))
        previous = likelihood
        weights = (joint / total) @ share


def compare(tokenize_folder: Path, sources: Sequence[str]) -> dict[str, float]:
    """Train on the train split of `sources`, choose weights on validation, score test. The folder is tokenize's output.

    The predictions are those of `runtime.megatron.data.HeldOut`: every token of a source's stream but the first.
    Returns "bigram/perplexity" (a token) and "bigram/bits_per_byte" over all sources, "bigram/loss/<source>" in nats a
    token. Raises DataError when validation or test holds nothing to predict.
    """
    summary = json.loads((tokenize_folder / "summary.json").read_text(encoding="utf-8"))

    def streams(split: str) -> dict[str, Array]:
        found: dict[str, Array] = {
            source: np.memmap(
                tokenize_folder / split / f"{source}.bin", dtype=np.dtype(summary["token_dtype"]), mode="r"
            )
            for source in sources
            if summary["tokens"][split][source] > 1
        }
        if not found:
            raise DataError(f"{split} holds no tokens of {', '.join(sources)}: the bigram baseline needs some")
        return found

    model = count(streams("train").values(), summary["vocab_size"])
    model = fit_weights(model, streams("validation").values())
    losses = {
        source: (sum(model.loss(before, after) for before, after in _chunks(stream)), len(stream) - 1)
        for source, stream in streams("test").items()
    }
    nats, predictions = (sum(pair[i] for pair in losses.values()) for i in (0, 1))
    num_bytes = sum(summary["bytes"]["test"][source] for source in losses)
    return {
        "bigram/perplexity": math.exp(nats / predictions),
        "bigram/bits_per_byte": nats / math.log(2) / num_bytes,
        **{f"bigram/loss/{source}": total / number for source, (total, number) in losses.items()},
    }


def _chunks(stream: Array) -> Iterable[tuple[Array, Array]]:
    """Every token but the first, with the one before it: (before, after), at most CHUNK_TOKENS of them at a time."""
    for begin in range(0, len(stream) - 1, CHUNK_TOKENS):
        piece = np.asarray(stream[begin : begin + CHUNK_TOKENS + 1], dtype=np.int64)
        yield piece[:-1], piece[1:]
