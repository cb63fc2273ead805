"""Drop what is not worth training on, and what is there twice: heuristics, personal data, exact and near duplicates.

Reads ingest's documents and leaves the same layout: `work/<stage>/output/{train,validation,test}/<source>.jsonl` and
`split.json`. `dropped.jsonl` shows samples of what each filter dropped and why, `set_aside.jsonl` what could not be judged.
kept + dropped + set aside = in, where ingest's set aside counts as well.

Documents go through the source's heuristics, then personal data is replaced, then a fingerprint is taken; held-out text is
treated as training text is. Of documents that repeat each other one stays: a document of the test split before one of
validation, one of validation before one of training, so that what is trained on never nearly repeats what is measured on.
Texts are streamed; of each a fingerprint and its place in an index are held, about 4 KB with 128 permutations.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from trainwright.runtime.errors import DataError, MissingExtra
from trainwright.runtime.stages import curation, stage_verb
from trainwright.runtime.stages.connectors import Rejected, excerpt
from trainwright.runtime.stages.corpus import SPLITS, document_file, read_summary
from trainwright.runtime.stages.duplicates import (
    Deduplicate,
    Duplicate,
    Fingerprint,
    Fingerprinter,
    find_duplicates,
)
from trainwright.runtime.stages.filters import Heuristic, load_heuristics
from trainwright.runtime.stages.personal_data import KINDS
from trainwright.runtime.stages.personal_data import scrub as scrub_text
from trainwright.runtime.stages.split import SPLIT_FILE, SplitRule
from trainwright.runtime.workspace import Progress, StageFolder, open_workspace, write_json

__all__ = ["Deduplicate", "Source", "run"]

RANKS = {"test": 0, "validation": 1, "train": 2}  # of documents that repeat each other the lowest stays


@dataclass(frozen=True)
class Source:
    """One of ingest's sources."""

    name: str
    filters: str  # "prose" | "code" | "none"
    weight: float  # wanted share of the training text; 0.0 for all: by bytes


@stage_verb
def run(
    *, stage: str, inputs: str, sources: Sequence[Source], deduplicate: Deduplicate, scrub: Sequence[str], seed: int
) -> None:
    """Curate `sources` of stage `inputs` into `work/<stage>/output`.

    Raises MissingExtra without datatrove and rensa, DataError when nothing of a source is left to train on, or when the
    files of stage `inputs` do not hold what its summary says.
    """
    for package in ("datatrove", "rensa"):
        _require(package)
    unknown = sorted(set(scrub) - set(KINDS))
    if unknown:
        raise DataError(f"there is no personal data of kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    heuristics = {source.name: load_heuristics(source.filters) for source in sources}
    workspace = open_workspace()
    folder, source_folder = workspace.stage(stage), workspace.stage(inputs)
    ingested = read_summary(source_folder)
    there = ingested["documents"]["train"]
    missing = [name for name in heuristics if name not in there]
    if missing:
        raise DataError(f"stage {inputs!r} has no source {missing[0]!r}; it has {', '.join(there)}")
    rule = SplitRule.read(source_folder.output / SPLIT_FILE)
    spool = folder.path / "spool"
    for path in (folder.output, spool):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    expected = sum(ingested["documents"][split][name] for split in SPLITS for name in heuristics)
    work = _Curation(folder, spool, Progress(folder, 2 * expected, "documents, read and written"), seed)
    work.tally.set_aside.update(ingested["set_aside"])
    fingerprinter = Fingerprinter(deduplicate, seed)
    with open(folder.output / "set_aside.jsonl", "w", encoding="utf-8") as aside:
        for split in SPLITS:
            for name, heuristic in heuristics.items():
                work.screen(source_folder.output, (split, name), heuristic, scrub, fingerprinter, aside)
    duplicates = find_duplicates(work.fingerprints, deduplicate, lambda index: str(work.read(index)["text"]))
    work.distribute(duplicates)
    shutil.rmtree(spool)
    work.samples.write(folder.output / "dropped.jsonl")

    curation.refuse_empty(list(heuristics), work.tally, folder.output / "dropped.jsonl")
    summary = curation.summarise(work.tally, list(heuristics), {source.name: source.weight for source in sources})
    if summary["in"] != expected + sum(ingested["set_aside"].values()):
        raise DataError(
            f"stage {inputs!r} counted {expected} documents of {', '.join(heuristics)} and its files hold"
            f" {work.tally.read.total()}: they were changed; run it again (--from {inputs})"
        )
    curation.report(summary)
    rule.write(folder.output / SPLIT_FILE)
    write_json(folder.summary, summary)


def _require(package: str) -> None:
    try:
        import_module(package)
    except ImportError as error:
        raise MissingExtra(
            f"curate needs {package} ({error}); install it with pip install 'trainwright[data]'"
        ) from None


class _Curation:
    """The passes over the documents, and what they leave."""

    def __init__(self, folder: StageFolder, spool: Path, progress: Progress, seed: int) -> None:
        self.tally, self.samples = curation.Tally(), curation.Samples(seed)
        self.fingerprints: list[Fingerprint] = []  # of the documents in the spool
        self._positions: list[tuple[curation.Place, int]] = []  # where each lies: place, byte offset
        self._places: list[curation.Place] = []
        self._folder, self._spool, self._progress, self._done = folder, spool, progress, 0

    def screen(
        self,
        ingested: Path,
        place: curation.Place,
        heuristic: Heuristic,
        scrub: Sequence[str],
        fingerprinter: Fingerprinter,
        aside: IO[str],
    ) -> None:
        """Judge the documents of one split and source; spool and fingerprint those that pass."""
        self._places.append(place)
        split, source = place
        spooled = document_file(self._spool, split, source)
        spooled.parent.mkdir(exist_ok=True)
        with open(document_file(ingested, split, source), "rb") as lines, open(spooled, "wb") as passed:
            for number, line in enumerate(lines, start=1):
                record = json.loads(line)
                text, num_bytes = record["text"], len(record["text"].encode())
                self.tally.read[place] += 1
                self.tally.read_bytes[place] += num_bytes
                try:
                    verdict = heuristic(text)
                    record["text"], counts = scrub_text(text, scrub)
                except (
                    Exception
                ) as error:  # rules of others, on whatever a corpus holds: one document must not end a run
                    reason = f"{type(error).__name__} in a filter"
                    self.tally.set_aside[reason] += 1
                    rejected = Rejected(f"{split}/{source}.jsonl", number, reason, f"{error}: {excerpt(text.encode())}")
                    aside.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")
                    self._advance(2)
                    continue
                if verdict is not None:
                    self.tally.drop(place, verdict, num_bytes)
                    self.samples.offer(verdict, record, place, dict)
                    self._advance(2)
                    continue
                self.tally.scrubbed.setdefault(place, Counter()).update(counts)
                if counts:
                    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                self._positions.append((place, passed.tell()))
                self.fingerprints.append(fingerprinter(record["text"], line, RANKS[split]))
                passed.write(line)
                self._advance()

    def read(self, index: int) -> dict[str, Any]:
        """A spooled record."""
        (split, source), offset = self._positions[index]
        with open(document_file(self._spool, split, source), "rb") as spooled:
            spooled.seek(offset)
            record: dict[str, Any] = json.loads(spooled.readline())
        return record

    def distribute(self, duplicates: dict[int, Duplicate]) -> None:
        """Write the spooled documents that are no duplicates to their files."""
        index = 0  # the spool is read in the order in which it was written
        for place in self._places:
            split, source = place
            final = document_file(self._folder.output, split, source)
            final.parent.mkdir(exist_ok=True)
            with open(document_file(self._spool, split, source), "rb") as spooled, open(final, "wb") as kept:
                for line in spooled:
                    record = json.loads(line)
                    num_bytes = len(record["text"].encode())
                    if index in duplicates:
                        name, more = self._describe(duplicates[index], split)
                        self.tally.drop(place, name, num_bytes)
                        self.samples.offer(name, record, place, more)
                    else:
                        kept.write(line)
                        self.tally.kept[place] += 1
                        self.tally.kept_bytes[place] += num_bytes
                    index += 1
                    self._advance()

    def _describe(self, duplicate: Duplicate, split: str) -> tuple[str, Callable[[], dict[str, Any]]]:
        """The filter's name, and what a sample says of the document that stays."""
        other_split, other_source = self._positions[duplicate.of][0]
        name = "duplicate/exact" if duplicate.is_exact else "duplicate/near"

        def more() -> dict[str, Any]:
            stays = {"id": self.read(duplicate.of)["id"], "split": other_split, "source": other_source}
            return {"repeats": stays, "similarity": duplicate.similarity}

        return name if other_split == split else f"{name}-of-{other_split}", more

    def _advance(self, passes: int = 1) -> None:
        self._done += passes
        self._progress.update(self._done)
