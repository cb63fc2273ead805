"""What an evaluation asks of a model: each measure knows its metrics and items before there is a model to ask."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trainwright.runtime.errors import DataError
from trainwright.runtime.megatron.loop import Score
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.stages import bigram, preferences
from trainwright.runtime.stages.chat import ChatTokenizer, fit
from trainwright.runtime.stages.heldout import HeldOutText, window_sequences
from trainwright.runtime.stages.intervals import Array, Figure, Items, difference, estimate, share
from trainwright.runtime.stages.records import Conversation, Preference, Records


class NothingHeldOut(DataError):
    """Records that are read, and none of them to measure on."""


@dataclass(frozen=True)
class Metric:
    """One figure of a model. A model's values of it, one an item, are asked for later."""

    name: str
    unit: str  # what an item is
    ids: Sequence[str]  # of the items
    items: Items
    higher_is_better: bool
    is_share: bool = False
    listed: bool = True  # its items are written out; not where another metric has the same
    chance: float | None = None  # what guessing gives

    @property
    def method(self) -> str:
        """How the interval is made."""
        return "Wilson" if self.is_share else f"bootstrap over {self.unit}"

    def figure(self, values: Array, seed: int) -> Figure:
        """The figure of `values` [items]."""
        return share(values) if self.is_share else estimate(values, self.items, seed=seed, name=self.name)

    def difference(self, values: Array, others: Array, seed: int) -> Figure:
        """The figure of `values` less that of `others`, another model's."""
        return difference(values, others, self.items, seed=seed, name=self.name)


Values = Mapping[str, Array]  # of one model: by metric, one value an item


class Ask(Protocol):
    """Has the loaded model score sequences."""

    def __call__(self, sequences: Sequence[Tokens], *, greedy: bool = False) -> list[Score]: ...


@dataclass(frozen=True)
class Measure:
    """Some metrics that come from the same questions. `values` asks them of the loaded model."""

    metrics: Sequence[Metric]
    num_sequences: int  # that a model is asked to score
    counts: Mapping[str, Any]  # what was read, kept and left out
    values: Callable[[Ask], Values]


def measure_text(text: HeldOutText, sequence_length: int) -> Measure:
    """`perplexity`, `perplexity/<source>`, `bits_per_byte` on the test split of a tokenize stage: every token but the first of
    each source's stream, in windows of the context length that share no context. Raises DataError where it is empty."""
    held = text.windows("test", sequence_length)
    if not held:
        raise DataError(
            f"{', '.join(text.sources)}: no test text to measure perplexity on; give more documents, raise the share of the "
            "test split, or leave perplexity out"
        )
    windows = {source: window_sequences(one) for source, one in held.items()}
    unit = f"windows of {sequence_length} tokens"
    tokens = {source: _targets(those) for source, those in windows.items()}
    ids = {source: [f"{source}:{number}" for number in range(len(those))] for source, those in windows.items()}
    strata = np.repeat(np.arange(len(windows)), [len(those) for those in windows.values()])
    weights, names = np.concatenate(list(tokens.values())), [name for those in ids.values() for name in those]
    num_bytes = sum(text.summary["bytes"]["test"][source] for source in windows)
    whole = Items(weights, strata, exponential=True)
    by_byte = Items(weights, strata, scale=weights.sum() / num_bytes / math.log(2))
    metrics = [
        Metric("perplexity", unit, names, whole, higher_is_better=False, listed=False),
        Metric("bits_per_byte", unit, names, by_byte, higher_is_better=False, listed=False),
    ]
    for source, those in tokens.items():
        items = Items(those, exponential=True)
        metrics.append(Metric(f"perplexity/{source}", unit, ids[source], items, higher_is_better=False))

    def values(ask: Ask) -> Values:
        nats = {source: _nats(ask(those)) for source, those in windows.items()}
        everything = np.concatenate(list(nats.values()))
        by_source = {f"perplexity/{source}": those for source, those in nats.items()}
        return {"perplexity": everything, "bits_per_byte": everything, **by_source}

    counts = {f"{source} tokens": int(those.sum()) for source, those in tokens.items()}
    return Measure(metrics, len(weights), counts, values)


def bigram_figures(text: HeldOutText, sequence_length: int) -> dict[str, float]:
    """The metrics of `measure_text`, of an interpolated bigram model that is counted on the train split."""
    found = bigram.compare(text.folder, tuple(text.windows("test", sequence_length)))
    figures = {name: found[f"bigram/{name}"] for name in ("perplexity", "bits_per_byte")}
    losses = {
        name.removeprefix("bigram/loss/"): nats for name, nats in found.items() if name.startswith("bigram/loss/")
    }
    return figures | {f"perplexity/{source}": math.exp(nats) for source, nats in losses.items()}


def measure_conversations(
    name: str, records: Records[Conversation], chat: ChatTokenizer, *, limit: int, too_long: str
) -> Measure:
    """`loss/<name>`: nats a token of the assistant's, end of turn included, in the test split.

    Raises DataError where nothing is left to measure.
    """
    counts: Counter[str] = Counter()
    sequences: list[Tokens] = []
    ids: list[str] = []
    owners: list[int] = []  # of each sequence, the place of its conversation: one that was split is still one item
    for conversation in records.test:
        parts = fit(chat, conversation.messages, limit=limit, too_long=too_long, counts=counts)
        asked = [part for part in parts if sum(part.counts)]
        if asked:
            owners += [len(ids)] * len(asked)
            ids.append(conversation.id)
            sequences += asked
    _require(ids, f"conversations {name}", records, counts)
    metric = f"loss/{name}"
    items = Items(np.bincount(owners, _targets(sequences)))
    return Measure(
        [Metric(metric, "conversations", ids, items, higher_is_better=False)],
        len(sequences),
        {**records.counts, "measured": len(ids), **counts},
        lambda ask: {metric: np.bincount(owners, _nats(ask(sequences)))},
    )


def measure_preferences(
    name: str, records: Records[Preference], chat: ChatTokenizer, *, limit: int, too_long: str
) -> Measure:
    """`preference_accuracy/<name>`: the share of pairs whose chosen answer has the higher summed log-probability, end of turn
    included; the same of each kind of rejected answer; `chosen_log_probability/<name>`: mean nats of the chosen answers.

    Raises DataError where no pair is left.
    """
    counts: Counter[str] = Counter()
    sequences: list[Tokens] = []
    kept: list[Preference] = []
    for record in records.test:
        for pair in preferences.tokenise([record], chat, limit, too_long, counts):
            sequences.extend(pair)
            kept.append(record)
    _require(kept, f"preferences {name}", records, counts)
    ids, kinds = [record.id for record in kept], np.array([record.kind for record in kept])
    accuracy, chosen_mean = f"preference_accuracy/{name}", f"chosen_log_probability/{name}"
    named = sorted(set(kinds.tolist()) - {""})
    places = {f"{accuracy}/{kind}": np.flatnonzero(kinds == kind) for kind in named}
    metrics = [
        Metric(
            accuracy, "pairs", ids, Items(np.ones(len(ids))), higher_is_better=True, is_share=True, listed=not named
        ),
        *(
            Metric(
                one,
                "pairs",
                [ids[at] for at in where],
                Items(np.ones(len(where))),
                higher_is_better=True,
                is_share=True,
            )
            for one, where in places.items()
        ),
        Metric(chosen_mean, "pairs", ids, Items(np.ones(len(ids))), higher_is_better=True),
    ]

    def values(ask: Ask) -> Values:
        scores = -_nats(ask(sequences))
        chosen, rejected = scores[0::2], scores[1::2]
        right = (chosen > rejected).astype(np.float64)
        return {accuracy: right, chosen_mean: chosen, **{one: right[where] for one, where in places.items()}}

    return Measure(metrics, len(sequences), {**records.counts, "measured": len(ids), **counts}, values)


def _require(kept: Sequence[object], what: str, records: Records[Any], counts: Counter[str]) -> None:
    if not kept:
        listed = ", ".join(f"{number} {reason}" for reason, number in {**records.counts, **counts}.items())
        raise NothingHeldOut(
            f"{what}: no held-out item to measure on; {len(records.test)} are in the test split ({listed}); give more records"
        )


def _targets(sequences: Sequence[Tokens]) -> Array:
    return np.array([sum(sequence.counts) for sequence in sequences], dtype=np.float64)


def _nats(scores: Sequence[Score]) -> Array:
    return -np.array([score.log_probability for score in scores])
