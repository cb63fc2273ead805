"""The bigram baseline against its definition, written out, and against a unigram model on real text."""

import itertools
import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages import bigram

SPLITS = ("train", "validation", "test")
Streams = dict[str, dict[str, list[int]]]


def write_corpus(folder: Path, streams: Streams, vocab_size: int) -> Path:
    for split, sources in streams.items():
        (folder / split).mkdir(parents=True)
        for source, tokens in sources.items():
            np.array(tokens, dtype=np.uint16).tofile(folder / split / f"{source}.bin")
    summary = {
        "vocab_size": vocab_size,
        "token_dtype": "uint16",
        "tokens": {split: {name: len(rows) for name, rows in sources.items()} for split, sources in streams.items()},
        "bytes": {split: {name: 3 * len(rows) for name, rows in sources.items()} for split, sources in streams.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def probability(
    streams: list[list[int]], vocab_size: int, weights: tuple[float, float, float], before: int, after: int
) -> float:
    """P(after | before) by the definition, counted afresh."""
    pairs = [pair for stream in streams for pair in itertools.pairwise(stream)]
    tokens = [token for stream in streams for token in stream]
    unigram = tokens.count(after) / len(tokens)
    starts = [first for first, _ in pairs].count(before)
    of_pair = pairs.count((before, after)) / starts if starts else unigram
    return weights[0] * of_pair + weights[1] * unigram + weights[2] / vocab_size


VOCAB_SIZE = 9


def small_streams() -> Streams:
    rng = random.Random(0)

    def walk(length: int, tokens: int) -> list[int]:
        steps = [rng.randrange(tokens)]
        while len(steps) < length:
            steps.append((steps[-1] + rng.choice((1, 1, 1, 2, 5))) % tokens)
        return steps

    # Token 8 is in no training text, 7 only as the last of one, where nothing follows it.
    return {
        "train": {"code": walk(60, 7), "prose": [*walk(30, 7), 7]},
        "validation": {"code": walk(40, 8), "prose": walk(25, 9)},
        "test": {"code": [*walk(35, 9), 7, 3], "prose": walk(30, 9)},
    }


def test_it_is_the_definition_with_the_weights_that_validation_likes_best(tmp_path: Path) -> None:
    streams = small_streams()
    training = list(streams["train"].values())
    found = bigram.compare(write_corpus(tmp_path, streams, VOCAB_SIZE), ("code", "prose"))

    def nats(split: str, source: str, weights: tuple[float, float, float]) -> float:
        return -sum(
            math.log(probability(training, VOCAB_SIZE, weights, before, after))
            for before, after in itertools.pairwise(streams[split][source])
        )

    def validation(weights: tuple[float, float, float]) -> float:
        return nats("validation", "code", weights) + nats("validation", "prose", weights)

    model = bigram.count([np.array(stream) for stream in training], VOCAB_SIZE)
    model = bigram.fit_weights(model, [np.array(stream) for stream in streams["validation"].values()])
    assert sum(model.weights) == pytest.approx(1)
    grid = [(a / 20, b / 20, (20 - a - b) / 20) for a in range(20) for b in range(20 - a)]
    assert validation(model.weights) <= min(validation(weights) for weights in grid) + 1e-4

    losses = {source: nats("test", source, model.weights) for source in ("code", "prose")}
    sizes = {source: len(streams["test"][source]) - 1 for source in losses}
    for source, loss in losses.items():
        assert found[f"bigram/loss/{source}"] == pytest.approx(loss / sizes[source], rel=1e-9)
    total = sum(losses.values())
    assert found["bigram/perplexity"] == pytest.approx(math.exp(total / sum(sizes.values())), rel=1e-9)
    num_bytes = sum(3 * len(tokens) for tokens in streams["test"].values())
    assert found["bigram/bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-9)


def test_probabilities_after_any_token_add_up_to_one() -> None:
    streams = small_streams()["train"].values()
    model = bigram.count([np.array(stream) for stream in streams], VOCAB_SIZE)
    everything = np.arange(VOCAB_SIZE)
    for before in range(VOCAB_SIZE):
        parts = model.components(np.full(VOCAB_SIZE, before), everything)
        assert parts.sum(axis=1) == pytest.approx([1.0, 1.0, 1.0])


def test_counting_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, small_streams(), VOCAB_SIZE)
    whole = bigram.compare(folder, ("code", "prose"))
    monkeypatch.setattr(bigram, "CHUNK_TOKENS", 7)
    assert bigram.compare(folder, ("code", "prose")) == pytest.approx(whole)


def test_on_real_text_it_beats_a_unigram_model(tmp_path: Path) -> None:
    """The standard library's source by bytes: the train split's unigram model is the one to beat."""
    modules = {"train": (argparse_source(),), "validation": (text_of(json),), "test": (text_of(statistics),)}
    streams: Streams = {split: {"code": list("".join(texts).encode())} for split, texts in modules.items()}
    found = bigram.compare(write_corpus(tmp_path, streams, 256), ("code",))
    counts = Counter(streams["train"]["code"])
    total = counts.total() + 256
    test = streams["test"]["code"][1:]
    unigram = math.exp(-sum(math.log((counts[token] + 1) / total) for token in test) / len(test))
    assert found["bigram/perplexity"] < 0.7 * unigram


def argparse_source() -> str:
    import argparse

    return text_of(argparse)


def text_of(module: object) -> str:
    return Path(str(module.__file__)).read_text(encoding="utf-8")  # type: ignore[attr-defined]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_without_held_out_tokens_it_says_which_are_missing(tmp_path: Path, split: str) -> None:
    streams = small_streams()
    streams[split] = {"code": [], "prose": [3]}
    with pytest.raises(DataError, match=f"{split} holds no tokens of code, prose"):
        bigram.compare(write_corpus(tmp_path, streams, VOCAB_SIZE), ("code", "prose"))
