"""What curate counts and shows: documents by split, source and filter, samples of what was dropped, the mixture."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.corpus import SPLITS
from trainwright.runtime.workspace import write_atomically

SAMPLES = 20  # a filter
EXCERPT_CHARACTERS = 300

Place = tuple[str, str]  # split, source


@dataclass
class Tally:
    """Counts of documents and of UTF-8 bytes by place."""

    read: Counter[Place] = field(default_factory=Counter)
    read_bytes: Counter[Place] = field(default_factory=Counter)
    dropped: dict[Place, Counter[str]] = field(default_factory=dict)  # by filter
    dropped_bytes: dict[Place, Counter[str]] = field(default_factory=dict)
    scrubbed: dict[Place, Counter[str]] = field(default_factory=dict)  # finds by kind, of kept and repeated documents
    set_aside: Counter[str] = field(default_factory=Counter)  # by reason
    kept: Counter[Place] = field(default_factory=Counter)
    kept_bytes: Counter[Place] = field(default_factory=Counter)

    def drop(self, place: Place, name: str, num_bytes: int) -> None:
        self.dropped.setdefault(place, Counter())[name] += 1
        self.dropped_bytes.setdefault(place, Counter())[name] += num_bytes

    def by_filter(self, sources: Sequence[str]) -> Counter[str]:
        """Documents of `sources` dropped by each filter, all splits together."""
        return sum((counts for (_, source), counts in self.dropped.items() if source in sources), Counter())


class Samples:
    """Up to SAMPLES documents that each filter dropped, chosen by a seeded hash: whatever the order, the same ones."""

    def __init__(self, seed: int) -> None:
        self._seed = seed.to_bytes(8, signed=True)
        self._kept: dict[str, list[tuple[int, dict[str, Any]]]] = {}

    def offer(self, name: str, record: Mapping[str, Any], place: Place, more: Callable[[], dict[str, Any]]) -> None:
        """`more` is called for what a sample says beside the record, only where it becomes one."""
        content = json.dumps([record["id"], record["text"]]).encode()
        # heapq keeps the smallest in front, which is the next to go
        key = -int.from_bytes(hashlib.blake2b(content, digest_size=8, key=self._seed).digest())
        kept = self._kept.setdefault(name, [])
        if len(kept) >= SAMPLES and key <= kept[0][0]:
            return
        if any(key == other for other, _ in kept):
            return
        split, source = place
        excerpt = record["text"][:EXCERPT_CHARACTERS]
        sample = {"filter": name, "split": split, "source": source, "id": record["id"], **more(), "excerpt": excerpt}
        (heapq.heappush if len(kept) < SAMPLES else heapq.heapreplace)(kept, (key, sample))

    def write(self, path: Path) -> None:
        """One JSON object a line, by filter."""
        rows = [
            sample for name in sorted(self._kept) for _, sample in sorted(self._kept[name], key=lambda pair: -pair[0])
        ]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def mixture(weights: Mapping[str, float], documents: Mapping[str, int], size: Mapping[str, int]) -> dict[str, Any]:
    """How the sources' training text is to be mixed, by source. `weights` all 0: by bytes.

    `epochs` is how often a source is read when as many bytes are read as there are in all; `repeats` is that in units of
    the source that is read least.
    """
    total, wanted = sum(size.values()), sum(weights.values())
    natural = {name: size[name] / total for name in weights}
    shares = {name: weights[name] / wanted if wanted else natural[name] for name in weights}
    epochs = {name: shares[name] / natural[name] for name in weights}
    least = min(epoch for epoch in epochs.values() if epoch)
    return {
        name: {
            "documents": documents[name],
            "bytes": size[name],
            "natural_share": natural[name],
            "wanted_share": shares[name],
            "epochs": epochs[name],
            "repeats": epochs[name] / least,
        }
        for name in weights
    }


def refuse_empty(sources: Sequence[str], tally: Tally, samples: Path) -> None:
    """Raises DataError for a source of which nothing is left to train on."""
    for source in sources:
        if tally.kept["train", source]:
            continue
        read = sum(tally.read[split, source] for split in SPLITS)
        by_filter = tally.by_filter([source])
        counts = ", ".join(f"{count} {name}" for name, count in by_filter.most_common()) or "none was dropped"
        fixes = ["leave the source out"]
        if any(name.startswith("duplicate/near") for name in by_filter):
            fixes.insert(0, "set near_duplicates: 0 for the curate stage")
        if any(not name.startswith("duplicate/") for name in by_filter):
            fixes.insert(0, "set filters: none for it")
        raise DataError(
            f"source {source!r}: of {read} documents none is left to train on: {counts}; {samples} shows them;"
            f" {', or '.join(fixes)}"
        )


def summarise(tally: Tally, sources: Sequence[str], weights: Mapping[str, float]) -> dict[str, Any]:
    """summary.json: `documents` and `bytes` as ingest's, and every count by split, source and filter."""

    def nested(counts: Mapping[Place, Any]) -> dict[str, dict[str, Any]]:
        return {split: {source: counts.get((split, source), 0) for source in sources} for split in SPLITS}

    def by_name(counts: Mapping[Place, Counter[str]]) -> dict[str, dict[str, Any]]:
        return {split: {source: dict(counts.get((split, source), {})) for source in sources} for split in SPLITS}

    documents, size = nested(tally.kept), nested(tally.kept_bytes)
    by_filter = tally.by_filter(sources)
    num_aside = tally.set_aside.total()
    num_kept, num_dropped = tally.kept.total(), by_filter.total()
    megabytes = tally.kept_bytes.total() / 1e6
    return {
        "key_figure": f"{num_kept:,} documents, {megabytes:.1f} MB, {num_dropped:,} dropped, {num_aside:,} set aside",
        "in": num_kept + num_dropped + num_aside,
        "kept": num_kept,
        "dropped": num_dropped,
        "set_aside": dict(tally.set_aside),
        "documents": documents,
        "bytes": size,
        "read": {"documents": nested(tally.read), "bytes": nested(tally.read_bytes)},
        "dropped_by": by_name(tally.dropped),
        "dropped_bytes_by": by_name(tally.dropped_bytes),
        "scrubbed": by_name(tally.scrubbed),
        "mixture": mixture(weights, documents["train"], size["train"]),
    }


def report(summary: dict[str, Any]) -> None:
    """Print what each filter dropped, what is left, and how it is to be mixed."""
    read = summary["read"]
    rows = [("in", _total(read["documents"]), _total(read["bytes"]))]
    documents, size = _by_filter(summary["dropped_by"]), _by_filter(summary["dropped_bytes_by"])
    rows += [(name, count, size[name]) for name, count in documents.most_common()]
    rows += [("kept", _total(summary["documents"]), _total(summary["bytes"]))]
    print(f"{'':<44}{'documents':>12}{'bytes':>18}")
    for name, count, num_bytes in rows:
        print(f"{name:<44}{count:>12,}{num_bytes:>18,}")
    for split in SPLITS:
        for source, count in summary["documents"][split].items():
            was = read["documents"][split][source]
            print(f"{split:<10} {source}: {count:,} of {was:,} documents, {summary['bytes'][split][source]:,} bytes")
            if was and not count:
                print(f"warning: source {source!r} has nothing left in {split}")
    scrubbed = _by_filter(summary["scrubbed"])
    if scrubbed:
        print("replaced " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(scrubbed.items())))
    for source, part in summary["mixture"].items():
        print(
            f"mixture    {source}: {part['natural_share']:.1%} of the training bytes, {part['wanted_share']:.1%} wanted:"
            f" {part['epochs']:.2f} epochs at equal bytes, {part['repeats']:.2f} x the source that is repeated least"
        )
    aside = sum(summary["set_aside"].values())
    print(
        f"in {summary['in']:,} documents = kept {summary['kept']:,} + dropped {summary['dropped']:,} + set aside {aside:,}"
    )
    if aside:
        print(
            "warning: set aside " + ", ".join(f"{count} {why}" for why, count in sorted(summary["set_aside"].items()))
        )


def _total(nested: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sum(counts.values()) for counts in nested.values())


def _by_filter(nested: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Counter[str]:
    return sum((Counter(counts) for sources in nested.values() for counts in sources.values()), Counter())
